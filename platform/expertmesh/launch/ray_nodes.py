"""Several Ray nodes on this machine, one set of processes each, labelled with their pool.

`ray start` would bind every port on all interfaces and translate the loopback address away, so the
nodes are made with the class behind it. The kernel ends their processes when this one ends.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.core.domain.hardware import Pool
from expertmesh.errors import SetupError

if TYPE_CHECKING:
    from ray._private.node import Node

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 80 * 2**20
"""Groups talk HTTP and gloo and use no object store; Ray's minimum is 75 MiB."""


class RayNodes:
    """Must be used from one thread that lives as long as the nodes: they end with it."""

    def __init__(self, temp_dir: Path, dashboard_port: int) -> None:
        """The nodes' processes get this process' environment."""
        self._temp_dir = temp_dir
        self._dashboard_port = dashboard_port
        self._gcs_address = ""
        self._workers: dict[str, tuple[str, Node]] = {}
        """By Ray's id of the node: its pool, and the node."""

    @property
    def dashboard_url(self) -> str:
        return f"http://{_LOOPBACK}:{self._dashboard_port}"

    def start_head(self) -> None:
        """The head carries no ranks: GCS, the dashboard with its REST API, Serve's controller."""
        head = self._start(
            head=True,
            num_cpus=0,
            include_dashboard=True,
            dashboard_host=_LOOPBACK,
            dashboard_port=self._dashboard_port,
        )
        self._gcs_address = str(head.gcs_address)

    def start_worker(self, pool: Pool) -> None:
        node = self._start(
            head=False,
            gcs_address=self._gcs_address,
            num_cpus=pool.cpus_per_node,
            node_manager_port=0,
            labels={"expertmesh.io/pool": pool.name},
        )
        self._workers[str(node.node_id)] = (pool.name, node)

    def workers_of(self, pool: str) -> list[str]:
        """Ray's ids of the pool's nodes."""
        return [node_id for node_id, (name, _) in self._workers.items() if name == pool]

    def take(self, node_id: str) -> None:
        """As a provider takes a spot node away: it is gone without another word."""
        _, node = self._workers.pop(node_id)
        node.kill_raylet(check_alive=False)

    def _start(self, *, head: bool, **parameters: object) -> "Node":
        # Ray reads its environment when it is imported, so that happens only now.
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        try:
            return Node(
                RayParams(
                    node_ip_address=_LOOPBACK,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    num_gpus=0,
                    min_worker_port=0,
                    max_worker_port=0,
                    dashboard_agent_listen_port=0,
                    metrics_export_port=0,
                    include_log_monitor=False,
                    temp_dir=str(self._temp_dir),
                    **parameters,
                ),
                head=head,
                shutdown_at_exit=False,
                spawn_reaper=True,
            )
        except Exception as error:
            kind = "head" if head else "worker"
            raise SetupError(
                f"a Ray {kind} node did not start: {error}; see the logs in {self._temp_dir}"
            ) from error
