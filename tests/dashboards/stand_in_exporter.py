"""Stands in for a gateway, a controller and a Ray node under load: serves every metric of theirs.

The values move as those of two models on two pools might. Run as a program, it prints its port; it
wants the token of the environment variable EXPERTMESH_MESH_TOKEN, as the real ones do.
"""

import os
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from expertmesh.telemetry import ray_metrics
from expertmesh.telemetry.metrics import ALL, Metric

TICK_S = 0.2

LABEL_VALUES = {
    "model": ("tiny-moe", "other-moe"),
    "pool": ("cpu-small", "cpu-large"),
    "group": ("em-tiny-moe-cpu-small-1", "em-other-moe-cpu-large-1"),
    "endpoint": ("/v1/chat/completions", "/v1/messages"),
    "status": ("200", "429", "503"),
    "direction": ("in", "cached", "out"),
    "state": ("starting", "ready", "draining", "lost"),
    "action": ("start", "drain", "remove"),
    "binding": ("load", "budget"),
    "part": (
        *("now", "expected", "spare", "needed", "held", "ready", "coming"),
        *("attributed", "idle", "starting", "draining", "idle_nodes"),
        *("spent", "least"),
    ),
    "quantile": ("0.1", "0.5", "0.9"),
    "option": ("cpu-small/t1d2e2", "cpu-large/t1d2e2"),
    "before": ("", "starting", "ready"),
    "after": ("starting", "ready", "lost"),
    "zone": ("zone-a", "zone-b"),
    "step": ("capacity ledger", "observe nodes"),
    "result": ("met", "slow_start", "slow_tokens", "failed"),
    "tenant": ("acme", "zoo"),
    "rank": ("0", "1"),
    "layer": ("0", "1", "2"),
    "gateway": ("gateway-1",),
    "reason": ("queue_full", "no_capacity"),
    "priority": ("interactive", "batch"),
    "kind": ("requests_per_min", "usd_per_day"),
    "expert": tuple(str(number) for number in range(16)),
}


class LivelyMetric:
    def __init__(self, metric: Metric, registry: CollectorRegistry, chance: random.Random) -> None:
        self._chance = chance
        self._metric = metric
        if metric.kind == "histogram":
            made: Counter | Gauge | Histogram = Histogram(
                metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
            )
        else:
            kind = Counter if metric.kind == "counter" else Gauge
            made = kind(metric.name, metric.help, metric.labels, registry=registry)
        values = product(*(LABEL_VALUES[label] for label in metric.labels))
        self._children = [made.labels(*each) if each else made for each in values]

    def move(self) -> None:
        for child in self._children:
            if isinstance(child, Counter):
                child.inc(self._chance.uniform(0.0, 5.0))
            elif isinstance(child, Gauge):
                child.set(self._chance.randrange(0, 8))
            else:
                child.observe(self._chance.uniform(0.0, self._metric.buckets[-2]))


class MetricsHandler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    token: str

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send_error(401)
            return
        body = generate_latest(self.registry)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """One line per scrape would drown the test's own output."""


def main() -> None:
    registry = CollectorRegistry()
    chance = random.Random(20)
    metrics = [LivelyMetric(metric, registry, chance) for metric in (*ALL, *ray_metrics.ALL)]

    class Handler(MetricsHandler):
        pass

    Handler.registry = registry
    Handler.token = os.environ["EXPERTMESH_MESH_TOKEN"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    while True:
        for metric in metrics:
            metric.move()
        threading.Event().wait(TICK_S)


if __name__ == "__main__":
    main()
