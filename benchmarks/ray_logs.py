"""Timestamped lines of Ray Serve and vLLM, and the moments of a group's start found in them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

VLLM_LOG_PREFIX = "%(created).3f "
"""For VLLM_LOGGING_PREFIX: vLLM's own timestamps are whole seconds."""

BUILDING = "Serve builds the application"
BUILT = "the application is built"
PLACED = "Serve places the replicas"
REPLICA_IMPORTED = "replica code is imported"
CONFIGURED = "the engine is configured"
COORDINATED = "rank 0 has its coordinator"
ENGINE_IMPORTED = "engine core code is imported"
WEIGHTS = "weights are loaded"
ENGINE_READY = "KV cache and warm-up are done"
CONNECTED = "the front end is connected"
REPLICA_READY = "the replica is ready"

_OF_SERVE = (
    (re.compile(r"Importing and building app '(?P<group>[^']+)'"), BUILDING),
    (re.compile(r"Imported and built app '(?P<group>[^']+)'"), BUILT),
    (re.compile(r"Adding \d+ replicas? to .*app='(?P<group>[^']+)'"), PLACED),
)
_OF_A_RANK = (
    (re.compile(r"Started initializing replica"), REPLICA_IMPORTED),
    (re.compile(r"Using executor class"), CONFIGURED),
    (re.compile(r"Started DP Coordinator process"), COORDINATED),
    (re.compile(r"Initializing a V1 LLM engine"), ENGINE_IMPORTED),
    (re.compile(r"Loading weights took"), WEIGHTS),
    (re.compile(r"init engine \(profile"), ENGINE_READY),
    (re.compile(r"Started vLLM engine"), CONNECTED),
    (re.compile(r"Finished initializing replica"), REPLICA_READY),
)
_SERVE_LINE = re.compile(r"^[A-Z]+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)$")
_VLLM_LINE = re.compile(r"^(?:\(\S+ pid=\d+\) )?(\d{10}\.\d{3}) (.*)$")
_SERVE_TIME = "%Y-%m-%d %H:%M:%S,%f"


@dataclass(frozen=True, slots=True)
class Line:
    at_s: float
    text: str


def read_lines(file: Path) -> Iterator[Line]:
    """Lines that carry a time; the others continue one that does."""
    for text in file.read_text(errors="replace").splitlines():
        serve = _SERVE_LINE.match(text)
        if serve:
            yield Line(datetime.strptime(serve.group(1), _SERVE_TIME).timestamp(), serve.group(2))
            continue
        vllm = _VLLM_LINE.match(text)
        if vllm:
            yield Line(float(vllm.group(1)), vllm.group(2))


def start_marks(logs: Path, group: str, since_s: float) -> dict[str, float]:
    """When the group's start since `since_s` reached each of its steps; for steps that every rank
    takes, when the last one did. Only the first start counts if there were several."""
    marks: dict[str, float] = {}
    for file in logs.glob("worker-*.err"):
        for line in read_lines(file):
            step = _step_of_serve(line.text, group)
            if step is not None and line.at_s >= since_s:
                marks[step] = min(line.at_s, marks.get(step, line.at_s))
    from_s = marks.get(PLACED, since_s)
    for file in _rank_files(logs, group):
        for step, at_s in _rank_marks(read_lines(file), from_s).items():
            marks[step] = max(at_s, marks.get(step, at_s))
    return marks


def _step_of_serve(text: str, group: str) -> str | None:
    for pattern, step in _OF_SERVE:
        found = pattern.search(text)
        if found and found.group("group") == group:
            return step
    return None


def _rank_marks(lines: Iterable[Line], since_s: float) -> dict[str, float]:
    marks: dict[str, float] = {}
    for line in lines:
        if line.at_s < since_s:
            continue
        for pattern, step in _OF_A_RANK:
            if pattern.search(line.text):
                marks.setdefault(step, line.at_s)
    return marks


def _rank_files(logs: Path, group: str) -> Iterator[Path]:
    """Serve's own log of each replica, and what the replica and its engine print."""
    yield from (logs / "serve").glob(f"replica_{group}_*.log")
    for file in logs.glob("worker-*.out"):
        with file.open(errors="replace") as opened:
            head = opened.readline() + opened.readline()
        if f"ServeReplica:{group}:" in head:
            yield file
