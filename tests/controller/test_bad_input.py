"""What is wrong around the controller, and the decision and reason that it comes to."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from tests.controller.running_system import RunningSystem, two_pools
from tests.core.scaling.world import config, pool

from expertmesh.clients.ray_serve import Application
from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.option import GroupOption
from expertmesh.core.scaling.contract import Binding
from expertmesh.core.scaling.replay import read_record, replay

FIRST, SECOND = "em-tiny-cheap-1", "em-tiny-dear-2"


async def with_one_group(**rules: object) -> RunningSystem:
    system = RunningSystem(two_pools(min_groups=1, **rules))
    await system.pass_s(13)
    assert system.states() == {FIRST: "ready"}
    return system


async def with_two_groups(**rules: object) -> RunningSystem:
    system = await with_one_group(**rules)
    system.gateway.queued = 16
    await system.pass_s(16)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    return system


def bindings(system: RunningSystem) -> list[Binding]:
    records = [read_record(e.payload) for e in system.journal.entries if e.kind == "decision"]
    assert all(replay(record).equal for record in records)
    return [record.decision.binding for record in records]


# Ray's dashboard


async def hang() -> tuple[Application, ...]:
    await asyncio.Event().wait()
    raise AssertionError


async def nonsense() -> tuple[Application, ...]:
    raise KeyError("applications")


@pytest.mark.parametrize(
    ("answer", "said"),
    [(hang, "did not answer within 0.01 s"), (nonsense, "KeyError: 'applications'")],
)
async def test_a_dashboard_that_is_slow_or_answers_nonsense_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], Awaitable[tuple[Application, ...]]],
    said: str,
) -> None:
    system = await with_two_groups(down_delay_s=5)
    monkeypatch.setattr("expertmesh.controller.observe._SERVE_TIMEOUT_S", 0.01)
    puts = list(system.serve.puts)
    with monkeypatch.context() as patched:
        patched.setattr(system.serve, "applications", answer)
        system.gateway.queued = 0
        await system.pass_s(40)
        assert system.states() == {FIRST: "ready", SECOND: "ready"}
        assert "not scaling down: Serve does not answer" in system.reasons[-1]
        assert said in system.controller.not_ready()["observe applications"]
        # Nor is anything started.
        system.gateway.queued = 30
        await system.pass_s(10)
        assert "holding: Serve does not answer" in system.reasons[-1]
    assert system.serve.puts == puts
    system.gateway.queued = 0
    await system.pass_s(20)
    assert system.states() == {FIRST: "ready"}
    assert system.controller.not_ready() == {}
    bindings(system)


async def test_nodes_that_cannot_be_listed_start_nothing_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = await with_one_group()
    with monkeypatch.context() as patched:
        patched.setattr(system.serve, "nodes", nonsense)
        system.gateway.queued = 16
        await system.pass_s(10)
        assert system.states() == {FIRST: "ready"}
        pending = system.pending()
        assert pending is not None
        assert "the nodes of pool dear could not be listed" in pending
    await system.pass_s(16)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}


# The store


@pytest.mark.parametrize("error", ["database or disk is full", "database is locked"])
async def test_a_store_that_is_full_or_locked_holds_everything_as_it_is(
    monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    system = await with_two_groups(down_delay_s=5)

    async def refuse(*_: object) -> int:
        raise sqlite3.OperationalError(error)

    with monkeypatch.context() as patched:
        patched.setattr(system.journal, "append", refuse)
        system.gateway.queued = 0
        await system.pass_s(30)
        assert system.states() == {FIRST: "ready", SECOND: "ready"}
        assert "the journal cannot be written" in system.reasons[-1]
        assert error in system.controller.not_ready()["journal"]
    await system.pass_s(15)
    assert system.states() == {FIRST: "ready"}
    assert system.controller.not_ready() == {}


# Clocks


@pytest.mark.parametrize("jump_s", [-86_400.0, -3600.0, -30.0, 30.0, 3600.0, 86_400.0])
async def test_a_clock_that_jumps_moves_no_group(jump_s: float) -> None:
    system = await with_two_groups()
    actions = system.actions()
    system.skew_s += jump_s
    await system.pass_s(40)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert system.actions() == actions
    assert system.controller.not_ready() == {}
    assert set(bindings(system)) <= {*Binding} - {Binding.BACKOFF}
    # It works on by the new time.
    system.gateway.queued = 0
    await system.pass_s(60)
    assert system.states() == {FIRST: "ready"}


# Pools and manifests


async def test_a_pool_that_costs_nothing_is_used_first_and_divides_nothing_by_zero() -> None:
    free = config(pool("free", 0.0), pool("dear", 0.45), min_groups=1)
    system = RunningSystem(free, pools={"free": 2, "dear": 2})
    await system.pass_s(14)
    assert system.states() == {"em-tiny-free-1": "ready"}
    assert "$0.00/h" in " ".join(system.reasons)
    system.gateway.queued = 16
    await system.pass_s(16)
    assert system.states() == {"em-tiny-free-1": "ready", SECOND: "ready"}
    system.gateway.queued = 0
    await system.pass_s(60)
    assert system.states() == {"em-tiny-free-1": "ready"}
    bindings(system)


async def test_only_pools_that_cost_nothing_are_no_reason_to_start_without_end() -> None:
    free = config(pool("free", 0.0, nodes=8), max_groups=4, down_delay_s=5)
    system = RunningSystem(free, pools={"free": 8})
    system.gateway.queued = 16
    await system.pass_s(30)
    assert list(system.states().values()) == ["ready", "ready"]
    system.gateway.queued = 0
    await system.pass_s(30)
    assert system.states() == {}


async def test_a_manifest_that_changes_while_groups_start_stops_none_of_them() -> None:
    system = RunningSystem(two_pools(min_groups=1))
    await system.pass_s(6)
    assert system.states() == {FIRST: "starting"}
    changed = two_pools(min_groups=1)
    wider = tuple(
        replace(option, engine={"seed": 7}, usd_per_hour=option.usd_per_hour * 2)
        for option in changed.options
    )
    system.restart_controller(replace(changed, max_model_len=512, options=wider))
    await system.pass_s(8)
    assert system.states() == {FIRST: "ready", SECOND: "starting"}
    assert system.serve.apps[FIRST].restarts == 0
    assert system.serve.apps[FIRST].spec.max_model_len == 1024
    assert system.serve.apps[SECOND].spec.max_model_len == 512
    assert system.serve.apps[SECOND].spec.engine == {"seed": 7}
    told = " ".join(system.reasons)
    assert f"to replace {FIRST}, which runs an older version" in told
    await system.pass_s(60)
    assert FIRST not in system.states()
    assert all(app.spec.max_model_len == 512 for app in system.serve.apps.values())


async def test_a_group_of_a_size_that_the_manifest_has_no_more_is_replaced_once() -> None:
    roomy = config(pool("cheap", 0.3, nodes=6), min_groups=1)
    system = RunningSystem(roomy, pools={"cheap": 6})
    await system.pass_s(6)
    one = Parallelism(tensor=1, data=1, expert=1)
    option = GroupOption("cheap", one, 0.3, roomy.options[0].rates, 60.0)
    system.restart_controller(replace(roomy, options=(option,)))
    await system.pass_s(150)
    specs = [app.spec for app in system.serve.apps.values()]
    assert [spec.parallelism for spec in specs] == [one]
    kinds = [kind for kind, _ in system.actions()]
    assert (kinds.count("start"), kinds.count("remove")) == (2, 1)
    assert list(system.states().values()) == ["ready"]


# Groups


async def test_a_group_that_never_becomes_ready_fails_backs_off_and_another_pool_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = RunningSystem(two_pools(min_groups=1))
    monkeypatch.setattr("tests.controller.fake_serve.START_S", 1e9)
    await system.pass_s(900)
    assert system.states() == {FIRST: "starting"}
    monkeypatch.setattr("tests.controller.fake_serve.START_S", 8.0)
    system.serve.failing_pools = set()
    system.serve.deaf_to_probes = {0}
    await system.pass_s(3)
    assert system.actions()[:3] == [("start", FIRST), ("remove", FIRST), ("start", SECOND)]
    assert any("start failed: not ready after 900 s" in reason for reason in system.reasons)
    assert system.recorded_state().backoff["cheap"].failures == 1


async def test_a_rank_that_answers_but_never_finishes_is_relieved_and_drained_by_the_deadline() -> (
    None
):
    system = await with_one_group(down_delay_s=5, drain_deadline_s=20)
    # Its engine takes requests and answers none; its probes are fine.
    system.gateway.in_flight = {FIRST: 8}
    system.gateway.queued = 4
    await system.pass_s(20)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert any("4 queued and 8 running requests" in reason for reason in system.reasons)
    # Never more than the room and the maximum, however long it lasts.
    await system.pass_s(200)
    assert len(system.states()) == 2
    changed = two_pools(max_groups=0, drain_deadline_s=20)
    system.gateway.queued = 0
    system.restart_controller(changed)
    await system.pass_s(40)
    assert FIRST not in system.states()
    assert any("8 in flight at the deadline of 20 s" in reason for reason in system.reasons)


# Notices


async def test_a_source_of_notices_that_fails_is_no_reason_not_to_be_ready(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = await with_one_group()
    monkeypatch.setattr(system.serve, "read", nonsense)
    await system.pass_s(10)
    assert system.controller.not_ready() == {}
    assert "observe spot notices failed" in caplog.text
    assert system.states() == {FIRST: "ready"}


async def test_a_noticed_node_is_left_for_what_is_free_beside_it() -> None:
    """In a local pool its workers are no room, and what runs there takes none of the rest."""
    system = RunningSystem(config(pool("only", nodes=4), min_groups=1), pools={"only": 4})
    await system.pass_s(13)
    name = "em-tiny-only-1"
    node = system.serve.nodes_of(name)[0]
    system.serve.notices = {node: system.clock() + 60.0}
    await system.pass_s(3)
    assert system.pending() is None
    assert system.states()["em-tiny-only-2"] == "starting"
    await system.pass_s(14)
    assert system.states() == {"em-tiny-only-2": "ready"}
    assert node not in system.serve.nodes_of("em-tiny-only-2")


async def test_a_notice_moves_a_group_to_another_pool_and_its_end_brings_it_back() -> None:
    system = await with_one_group()
    system.serve.notices = {node: system.clock() + 60.0 for node in system.serve.nodes_of(FIRST)}
    await system.pass_s(20)
    assert system.states() == {SECOND: "ready"}
    assert any("a node of it will be taken away in" in reason for reason in system.reasons)
    system.serve.notices = {}
    await system.pass_s(60)
    assert system.states() == {"em-tiny-cheap-3": "ready"}


# Modes


@pytest.mark.parametrize("mode", [ScalingMode.OBSERVE, ScalingMode.ADVISE])
async def test_only_observing_or_advising_moves_nothing(mode: ScalingMode) -> None:
    system = RunningSystem(two_pools(min_groups=1, mode=mode))
    system.gateway.queued = 30
    await system.pass_s(20)
    assert system.states() == {}
    assert system.serve.puts == []
    records = [read_record(e.payload) for e in system.journal.entries if e.kind == "decision"]
    assert all(record.decision.actions == () for record in records)
    assert bindings(system)[-1] is Binding.MODE
    advice = [action.group for action in records[-1].decision.advice]
    if mode is ScalingMode.OBSERVE:
        assert advice == []
        assert "would" not in system.reasons[-1]
    else:
        assert FIRST in advice
        assert f"would start {FIRST}" in system.reasons[-1]


async def test_modes_are_the_models_own_and_what_runs_under_advice_stays() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.restart_controller(two_pools(min_groups=1, down_delay_s=5, mode=ScalingMode.ADVISE))
    system.gateway.queued = 0
    await system.pass_s(60)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert any(f"would drain {SECOND}" in reason for reason in system.reasons)
    # A lost group under advice is told to the gateways all the same.
    system.serve.kill_rank(FIRST, 0)
    await system.pass_s(4)
    assert system.gateway.ready() == [SECOND]
