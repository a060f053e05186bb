"""vLLM's coordinator of data-parallel ranks, made to end with the rank that started it.

It loads no plugin, unlike the other processes of an engine, so it is given another entry point.
"""

from typing import Any

from vllm.v1.engine.coordinator import DPCoordinatorProc

from expertmesh.serving.fate_sharing import die_with_owner

_run_coordinator = DPCoordinatorProc.run_coordinator


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """In the coordinator's process, which finds this function by its name."""
    die_with_owner()
    _run_coordinator(*args, **kwargs)


def end_coordinator_with_rank() -> None:
    """For the process of a rank, before it starts its engine."""
    DPCoordinatorProc.run_coordinator = staticmethod(run_coordinator)
