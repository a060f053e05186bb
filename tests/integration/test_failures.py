"""What happens when parts are killed: requests, groups, money, and what is left behind."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tests.integration.running_system import (
    MODEL,
    RunningSystem,
    running_system,
    start_system,
    wait_until,
    wait_until_gone,
)

from expertmesh.launch.our_processes import end_processes

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUESTION: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
_GONE_S = 45.0
"""Ray's agents look for a dead raylet for some seconds and then report it for ten more."""


class Trickle:
    """A steady stream of short requests, each with the outcome it had."""

    def __init__(self, system: RunningSystem, key: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0, timeout=60
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Trickle":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            try:
                self._client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8)
                self.answered += 1
            except openai.OpenAIError as error:
                self.failures.append(str(error))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    """Two groups in two pools, so that one can be lost."""
    with running_system(tmp_path_factory.mktemp("failures"), groups=(2, 2)) as started:
        started.until_groups(2)
        yield started


@pytest.fixture(scope="module")
def key(system: RunningSystem) -> str:
    return system.new_key("failures")


def names(groups: list[dict[str, Any]]) -> list[str]:
    return [group["name"] for group in groups]


def replicas(system: RunningSystem, group: str) -> set[int]:
    """Process ids of the ranks of a group, as Serve knows them."""
    answer = httpx.get(
        f"{system.dashboard_url}/api/serve/applications/",
        headers={"Authorization": f"Bearer {system.state.ray_token()}"},
    )
    deployments = answer.json()["applications"][group]["deployments"].values()
    # A replica that is being started has no process yet.
    return {pid for each in deployments for r in each["replicas"] if (pid := r.get("pid"))}


def engines_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if child.name().startswith("VLLM")
    ]


def until_restored(system: RunningSystem, group: str) -> None:
    """The group has been noticed as broken, and all groups are ready again."""
    wait_until(
        lambda: group not in names(system.groups("ready")),
        60,
        f"{group} is seen as broken",
        system.describe,
    )
    system.until_groups(2)


def test_a_killed_controller_costs_no_request_and_no_group(system: RunningSystem, key: str) -> None:
    before = {name: replicas(system, name) for name in names(system.groups("ready"))}
    with Trickle(system, key) as trickle:
        wait_until(lambda: trickle.answered > 3, 30, "requests are answered")
        killed = system.service("controller")
        assert killed is not None
        killed.kill()
        killed.wait(10)
        wait_until(lambda: system.service("controller"), 20, "it is started again")
        system.until_groups(2, 60)
        answered = trickle.answered
        wait_until(lambda: trickle.answered > answered + 5, 60, "requests go on with the new one")
    assert trickle.failures == []
    assert {name: replicas(system, name) for name in names(system.groups("ready"))} == before


def test_a_killed_engine_costs_at_most_what_was_in_it(system: RunningSystem, key: str) -> None:
    group = names(system.groups("ready"))[0]
    rank = min(replicas(system, group))
    with Trickle(system, key) as trickle:
        wait_until(lambda: trickle.answered > 3, 30, "requests are answered")
        engines = engines_of(rank)
        assert engines
        for engine in engines:
            engine.kill()
        until_restored(system, group)
        answered = trickle.answered
        wait_until(lambda: trickle.answered > answered + 3, 60, "requests go on")
    # One client sends one request at a time: the one that was in the engine may end in an error.
    assert len(trickle.failures) <= 1, trickle.failures


def test_a_killed_replica_takes_its_engine_with_it_and_comes_back(
    system: RunningSystem, key: str
) -> None:
    group = names(system.groups("ready"))[0]
    rank = min(replicas(system, group))
    engines = engines_of(rank)
    assert engines
    psutil.Process(rank).kill()
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive
    until_restored(system, group)
    assert rank not in replicas(system, group)
    answer = httpx.post(
        f"{system.gateway_url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": MODEL, "messages": QUESTION, "max_tokens": 5},
        timeout=60,
    )
    assert answer.status_code == 200


def test_a_stream_whose_group_dies_ends_with_an_error_and_is_paid_for(
    system: RunningSystem, key: str
) -> None:
    tenant = "streams"
    headers = {"Authorization": f"Bearer {system.new_key(tenant)}"}
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 900, "stream": True}
    with httpx.stream(
        "POST",
        f"{system.gateway_url}/v1/chat/completions",
        headers=headers,
        json=body | {"ignore_eos": True},
        timeout=120,
    ) as stream:
        lines = stream.iter_lines()
        received = [next(lines) for _ in range(20)]
        serving = [
            rank["base_url"]
            for group in system.groups("ready")
            for rank in group["ranks"]
            if system.rank(rank["base_url"], "/em/info")["running"]
        ]
        assert len(serving) == 1
        group = serving[0].rpartition("/")[2]
        for pid in replicas(system, group):
            psutil.Process(pid).kill()
        received += list(lines)
    events = [line for line in received if line.startswith("data:")]
    assert '"error"' in events[-1] and "[DONE]" not in "".join(events)

    def recorded() -> list[dict[str, Any]]:
        usage = json.loads(system.run("usage", "--by", "tenant", "--json").stdout)
        return [row for row in usage["rows"] if row["tenant"] == tenant]

    (row,) = wait_until(recorded, 15, "the ledger holds the broken stream")
    assert row["completion_tokens"] >= 5
    until_restored(system, group)


def test_a_killed_raylet_leaves_no_process_of_its_node(system: RunningSystem, key: str) -> None:
    group = names(system.groups("ready"))[0]
    rank = psutil.Process(min(replicas(system, group)))
    raylet = rank.parent()
    assert raylet is not None and raylet.name() == "raylet"
    family = raylet.children(recursive=True)
    assert any(process.name().startswith("VLLM") for process in family)
    raylet.kill()
    _, alive = psutil.wait_procs(family, timeout=_GONE_S)
    assert not alive
    # Its pool has no room for the group any more, and says so where a person looks.
    wait_until(
        lambda: "pending: no room in pool" in shown_status(system),
        90,
        "status says what is missing",
    )
    with Trickle(system, key) as trickle:
        wait_until(lambda: trickle.answered > 5, 60, "the other group goes on")
    assert trickle.failures == []


def shown_status(system: RunningSystem) -> str:
    shown = system.run(
        *("status", "--once", "--platform", "test", "--controller-url", system.controller_url)
    ).stdout
    return " ".join(shown.split())


@pytest.fixture
def unstarted(tmp_path: Path) -> Iterator[Callable[..., RunningSystem]]:
    """Starts a system without waiting for it; ended by force when the test is over."""
    started: list[RunningSystem] = []

    def start(**options: Any) -> RunningSystem:
        started.append(start_system(tmp_path, **options))
        return started[-1]

    yield start
    for system in started:
        system.process.kill()
        system.process.wait(10)
        end_processes(system.state.marker, 0.0)


def test_killing_the_whole_system_leaves_nothing(unstarted: Callable[..., RunningSystem]) -> None:
    system = unstarted()
    system.until_groups(1)
    assert any(process.name().startswith("VLLM") for process in system.processes())
    system.process.kill()
    system.process.wait(10)
    assert wait_until_gone(system.state.marker, 20) == []


@pytest.mark.parametrize("seconds", [1.0, 6.0, 15.0, 35.0])
def test_ctrl_c_at_any_moment_of_the_demo_leaves_nothing(
    unstarted: Callable[..., RunningSystem], seconds: float
) -> None:
    system = unstarted(command="demo")
    time.sleep(seconds)
    system.process.send_signal(signal.SIGINT)
    # In the first second Python itself may still be starting.
    assert system.process.wait(60) in (130, -signal.SIGINT)
    assert wait_until_gone(system.state.marker, 0.0) == []
