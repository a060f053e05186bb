"""Metrics that Ray's nodes export themselves and that dashboards show, named once.

Prometheus finds the nodes by Ray's own discovery, or by the chart's PodMonitor; the label
`instance` of the scrape tells them apart.
"""

from typing import Final

from expertmesh.telemetry.metrics import Metric

NODE_CPU: Final = Metric("ray_node_cpu_utilization", "gauge", "Of the machine, in percent")
NODE_MEMORY_USED: Final = Metric("ray_node_mem_used", "gauge", "Bytes")
NODE_MEMORY: Final = Metric("ray_node_mem_total", "gauge", "Bytes")
NODE_SENDS: Final = Metric("ray_node_network_send_speed", "gauge", "Bytes each second")
NODE_RECEIVES: Final = Metric("ray_node_network_receive_speed", "gauge", "Bytes each second")
NODE_GPU: Final = Metric(
    "ray_node_gpus_utilization", "gauge", "Of one accelerator, in percent; none on CPUs"
)
NODE_GPU_MEMORY_USED: Final = Metric(
    "ray_node_gram_used", "gauge", "Megabytes of one accelerator's memory"
)
NODE_GPU_MEMORY_FREE: Final = Metric(
    "ray_node_gram_available", "gauge", "Megabytes of one accelerator's memory"
)

ALL: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
