"""Scaling with real parts: sleep and wake, nodes taken with and without notice, a budget."""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from tests.integration.running_system import (
    MODEL,
    RunningSystem,
    pool,
    running_system,
    wait_until,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUESTION: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
CHEAP, DEAR = "em-tiny-moe-cheap-", "em-tiny-moe-dear-"


class Clients:
    """Some that ask one question after the other, each with the outcome it had."""

    def __init__(self, system: RunningSystem, key: str, count: int, tokens: int = 8) -> None:
        self._client = openai.OpenAI(
            base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0, timeout=300
        )
        self._tokens = tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            try:
                self._client.chat.completions.create(
                    model=MODEL, messages=QUESTION, max_tokens=self._tokens
                )
                self.answered += 1
            except openai.OpenAIError as error:
                self.failures.append(str(error))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    """It may sleep; the dear pool has room for two groups, and the budget for one beside a cheap
    one."""
    with running_system(
        tmp_path_factory.mktemp("scaling"),
        groups=(0, 3),
        pools=[pool("cheap", 0.30), pool("dear", 0.90, cpus_per_node=2)],
        budget={"usd_per_hour": 1.60},
        target_in_flight_per_group=2,
        up_delay_s=1,
        down_delay_s=10,
        drain_deadline_s=30,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def key(system: RunningSystem) -> str:
    return system.new_key("scaling")


def ready(system: RunningSystem) -> list[str]:
    return [group["name"] for group in system.groups("ready")]


def reasons(system: RunningSystem) -> str:
    answer = httpx.get(
        f"{system.controller_url}/v1/decisions?limit=200", headers=system.mesh_headers, timeout=20
    )
    decisions = answer.raise_for_status().json()["decisions"]
    return "\n".join(decision["reason"] for decision in decisions)


def nodes_of(system: RunningSystem, group: str) -> dict[str, int]:
    """Ray's ids of the nodes of a group's ranks, each with the process of a rank there."""
    answer = httpx.get(
        f"{system.dashboard_url}/api/serve/applications/",
        headers={"Authorization": f"Bearer {system.state.ray_token()}"},
        timeout=20,
    )
    deployments = answer.json()["applications"][group]["deployments"].values()
    return {replica["node_id"]: replica["pid"] for d in deployments for replica in d["replicas"]}


def test_a_request_to_a_sleeping_model_is_held_and_answered(
    system: RunningSystem, key: str
) -> None:
    wait_until(lambda: system.fleet()["decisions"].get(MODEL), 60, "a first decision")
    assert system.groups() == []
    client = openai.OpenAI(
        base_url=f"{system.gateway_url}/v1", api_key=key, max_retries=0, timeout=300
    )
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content
    # The cheapest pool first.
    assert [name.rpartition("-")[0] + "-" for name in ready(system)] == [CHEAP]
    # And without requests it goes back to sleep.
    wait_until(lambda: not system.groups(), 120, "it sleeps again", system.describe)
    assert "0 wanted" in reasons(system)


def test_a_budget_that_binds_is_kept_and_said(system: RunningSystem, key: str) -> None:
    def spent() -> float:
        return float(sum(group["usd_per_hour"] for group in system.groups()))

    with Clients(system, key, 8, tokens=40) as clients:

        def is_said() -> bool:
            assert spent() <= 1.60
            said = "a group in pool dear at $0.90/h exceeds the budget of $1.60/h" in reasons(
                system
            )
            return said and len(ready(system)) == 2

        wait_until(is_said, 400, "two groups, and what keeps it from a third", system.describe)
    assert clients.failures == []
    assert {name.rpartition("-")[0] + "-" for name in ready(system)} == {CHEAP, DEAR}
    # The dear one goes first.
    wait_until(lambda: len(system.groups()) < 2, 120, "one is drained", system.describe)
    assert all(name.startswith(CHEAP) for name in ready(system))


def test_a_changed_model_changes_over_without_losing_a_request(
    system: RunningSystem, key: str
) -> None:
    """The controller reads its manifests when it starts."""

    def lengths() -> set[int]:
        models = [
            system.rank(rank["base_url"], "/v1/models")["data"][0]
            for group in system.groups("ready")
            for rank in group["ranks"]
        ]
        return {model["max_model_len"] for model in models}

    def has_changed() -> bool:
        # Until the new controller answers, and while a rank goes away.
        with contextlib.suppress(httpx.HTTPError):
            return lengths() == {512}
        return False

    with Clients(system, key, 1) as clients:
        wait_until(lambda: clients.answered > 3, 200, "requests are answered", system.describe)
        assert lengths() == {1024}
        manifest = yaml.safe_load(system.deployment_file.read_text())
        manifest["model"]["max_model_len"] = 512
        system.deployment_file.write_text(yaml.safe_dump(manifest))
        controller = system.service("controller")
        assert controller is not None
        controller.kill()
        wait_until(
            lambda: system.service("controller") not in (None, controller),
            30,
            "the controller is started again",
        )
        wait_until(has_changed, 400, "the new version serves alone", system.describe)
        wait_until(
            lambda: [name.startswith(CHEAP) for name in ready(system)] == [True],
            300,
            "it is back in the cheap pool, where there was no room beside the old one",
            system.describe,
        )
    assert clients.failures == []
    assert "which runs an older version of the model" in reasons(system)


def test_a_node_that_is_taken_with_notice_costs_no_request(system: RunningSystem, key: str) -> None:
    with Clients(system, key, 1) as clients:
        wait_until(lambda: clients.answered > 3, 200, "requests are answered", system.describe)
        (group,) = ready(system)
        assert group.startswith(CHEAP)
        noticed = sorted(nodes_of(system, group))[0]
        system.state.spot_notices.write_text(json.dumps({noticed: 200}))
        wait_until(
            lambda: [name for name in ready(system) if name.startswith(DEAR)],
            300,
            "it is replaced in the other pool",
            system.describe,
        )
        wait_until(
            lambda: group not in {each["name"] for each in system.groups()},
            60,
            "the noticed group is gone",
            system.describe,
        )
        answered = clients.answered
        wait_until(lambda: clients.answered > answered + 3, 60, "requests go on")
    assert clients.failures == []
    assert f"draining {group}: a node of it will be taken away in" in reasons(system)


def test_a_node_that_is_taken_without_notice_is_replaced(system: RunningSystem, key: str) -> None:
    with Clients(system, key, 1) as clients:
        wait_until(lambda: clients.answered > 3, 200, "requests are answered", system.describe)
        before = ready(system)
        group = before[0]
        assert group.startswith(DEAR)
        rank = psutil.Process(next(iter(nodes_of(system, group).values())))
        raylet = rank.parent()
        assert raylet is not None and raylet.name() == "raylet"
        raylet.kill()
        wait_until(lambda: group not in ready(system), 60, "the loss is seen", system.describe)
        wait_until(lambda: ready(system), 300, "it runs on what is left", system.describe)
        answered = clients.answered
        wait_until(lambda: clients.answered > answered + 3, 60, "requests go on")
    # One client sends one request at a time: the one that was in the engine may end in an error.
    assert len(clients.failures) <= 1, clients.failures
    assert f"{group} is lost" in reasons(system)
