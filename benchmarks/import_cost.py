"""What the Python imports of each process of a group cost, in child processes that do nothing
else."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

from benchmarks.process_watch import BUILD_TASK, COORDINATOR, ENGINE_CORE, REPLICA

# What each process has imported when a group is ready, named by the modules that bring in the rest.
_MODULES = {
    BUILD_TASK: "expertmesh.serving.group_app",
    REPLICA: "expertmesh.serving.group_app, vllm.v1.engine.async_llm, "
    "vllm.entrypoints.openai.api_server",
    COORDINATOR: "ray, vllm.v1.engine.coordinator",
    ENGINE_CORE: "ray, vllm.v1.engine.core, expertmesh.serving.cpu_worker, "
    "expertmesh.serving.cpu_collectives, vllm.model_executor.models.qwen3_moe",
}
_PROGRAM = """
import sys, time
began_s = time.perf_counter()
import {modules}
print("measured", time.perf_counter() - began_s, time.process_time(), len(sys.modules))
"""
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class ImportCost:
    wall_s: float
    cpu_s: float
    """Of the whole process, the interpreter's start included."""
    modules: int


def measure_imports() -> dict[str, ImportCost]:
    """By kind of process."""
    return {kind: _measure(modules) for kind, modules in _MODULES.items()}


def profile_imports(kind: str) -> tuple[tuple[str, float], ...]:
    """Share of the import time that each top-level package takes for itself, without what it
    imports, largest first. A run of its own: the profile slows imports down."""
    own_us: Counter[str] = Counter()
    for line in _run(_MODULES[kind], "-X", "importtime").stderr.splitlines():
        found = _LINE.match(line)
        if found:
            own_us[found.group(2).partition(".")[0]] += int(found.group(1))
    total_us = own_us.total()
    return tuple((package, us / total_us) for package, us in own_us.most_common())


def _measure(modules: str) -> ImportCost:
    wall_s, cpu_s, count = _run(modules).stdout.split()[-3:]
    return ImportCost(float(wall_s), float(cpu_s), int(count))


def _run(modules: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", _PROGRAM.format(modules=modules)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
