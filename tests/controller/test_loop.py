import asyncio
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from tests.controller.fake_serve import DELETE_S, Clock, FakeServe, RankLoad
from tests.controller.running_system import (
    MODEL,
    Gateway,
    RunningSystem,
    other_model,
    two_pools,
)
from tests.core.scaling.world import config, pool

from expertmesh.clients.ray_serve import ApplicationStatus
from expertmesh.core.domain.fleet import GroupLoad, GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.traffic import GatewayReport, ModelTraffic
from expertmesh.core.scaling.replay import read_record, replay

FIRST, SECOND = "em-tiny-cheap-1", "em-tiny-dear-2"


async def with_one_group(**rules: object) -> RunningSystem:
    system = RunningSystem(two_pools(min_groups=1, **rules))
    await system.pass_s(13)
    assert system.states() == {FIRST: "ready"}
    return system


async def with_two_groups(**rules: object) -> RunningSystem:
    """One group by the minimum, another by the work, which is still there."""
    system = await with_one_group(**rules)
    system.gateway.queued = 16
    await system.pass_s(16)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    return system


async def with_a_draining_group(**rules: object) -> RunningSystem:
    system = await with_two_groups(down_delay_s=5, **rules)
    system.gateway.queued = 0
    system.gateway.in_flight = {FIRST: 2, SECOND: 1}
    await system.pass_s(6)
    assert system.states() == {FIRST: "ready", SECOND: "draining"}
    return system


# Up and down


async def test_a_group_is_started_and_gateways_get_its_ranks() -> None:
    system = RunningSystem()
    await system.pass_s(2)
    assert system.serve.puts == [(FIRST,)]
    assert system.states() == {FIRST: "starting"}
    group = system.gateway.fleet.groups[0] if system.gateway.fleet else None
    assert group is not None
    assert group.expected_ready_at_s == 1_000_060
    await system.pass_s(12)
    assert system.gateway.ready() == [FIRST]
    fleet = system.controller.fleet
    assert fleet is not None
    assert [rank.index for rank in fleet.groups[0].ranks] == [0, 1]
    assert all(rank.base_url.endswith(f"/{FIRST}") for rank in fleet.groups[0].ranks)
    assert (fleet.groups[0].world_size, fleet.groups[0].usd_per_hour) == (2, 0.6)
    assert fleet.models[0].name == MODEL


async def test_a_burst_adds_a_group_and_quiet_removes_it() -> None:
    system = await with_two_groups(down_delay_s=5)
    assert system.serve.puts == [(FIRST,), (FIRST, SECOND)]
    system.gateway.queued = 0
    await system.pass_s(8)
    assert system.states() == {FIRST: "ready", SECOND: "draining"}
    assert system.serve.puts[-1] == (FIRST,)
    await system.pass_s(int(DELETE_S) + 2)
    assert system.states() == {FIRST: "ready"}
    assert system.actions() == [
        ("start", FIRST),
        ("start", SECOND),
        ("drain", SECOND),
        ("remove", SECOND),
    ]
    assert len(system.serve.puts) == 3


async def test_a_sleeping_model_wakes_with_the_first_request_and_sleeps_again() -> None:
    system = RunningSystem(two_pools(down_delay_s=5))
    await system.pass_s(5)
    assert system.serve.puts == []
    system.gateway.queued = 1
    await system.pass_s(14)
    assert system.gateway.ready() == [FIRST]
    system.gateway.queued = 0
    await system.pass_s(20)
    assert system.states() == {}
    assert system.serve.puts == [(FIRST,), ()]
    assert system.serve.apps == {}


async def test_fleet_versions_only_grow_and_stand_still_when_nothing_changes() -> None:
    system = RunningSystem()
    versions = []
    for _ in range(40):
        await system.pass_s(1)
        assert system.controller.fleet is not None
        versions.append(system.controller.fleet.version)
    assert versions == sorted(versions)
    assert versions[-1] == versions[-20]
    system.restart_controller()
    await system.pass_s(1)
    assert system.controller.fleet is not None
    assert system.controller.fleet.version > versions[-1]


# Loads


async def test_answers_carry_what_each_group_does() -> None:
    system = await with_two_groups()
    system.gateways = [
        Gateway("g1", queued=16, in_flight={FIRST: 3, SECOND: 1}),
        Gateway("g2", in_flight={FIRST: 4}),
    ]
    system.serve.busy = {FIRST: RankLoad(running=5, waiting=2, kv_usage=0.4)}
    await system.pass_s(2)
    system.exchange()
    for gateway in system.gateways:
        assert gateway.fleet is not None
        assert gateway.fleet.loads == {
            FIRST: GroupLoad(7, 10, 4, pytest.approx(0.45), kv_tokens=2000, max_running=16),
            SECOND: GroupLoad(1, 0, 0, 0.0, kv_tokens=2000, max_running=16),
        }


async def test_in_flight_is_that_of_the_moment_and_the_version_stands_still() -> None:
    system = await with_one_group()
    before = system.controller.fleet
    assert before is not None
    system.gateway.in_flight = {FIRST: 5}
    system.exchange()
    after = system.gateway.fleet
    assert after is not None
    assert (before.loads[FIRST].in_flight, after.loads[FIRST].in_flight) == (0, 5)
    system.serve.busy = {FIRST: RankLoad(running=5, kv_usage=0.9)}
    await system.pass_s(5)
    assert system.controller.fleet is not None
    assert system.controller.fleet.loads[FIRST].running == 10
    assert system.controller.fleet.version == before.version


async def test_a_gateway_that_is_silent_counts_nothing_in_flight() -> None:
    system = await with_one_group()
    system.gateways.append(Gateway("g2", in_flight={FIRST: 4}))
    await system.pass_s(1)
    system.gateways[1].is_silent = True
    counts = []
    for _ in range(7):
        await system.pass_s(1)
        assert system.controller.fleet is not None
        counts.append(system.controller.fleet.loads[FIRST].in_flight)
    assert counts == [4, 4, 4, 4, 0, 0, 0]


async def test_a_rank_that_misses_a_probe_keeps_its_last_figures() -> None:
    system = await with_one_group()
    system.serve.busy = {FIRST: RankLoad(running=5)}
    await system.pass_s(1)
    system.serve.deaf_to_probes = {1}
    await system.pass_s(1)
    assert system.controller.fleet is not None
    assert system.controller.fleet.loads[FIRST].running == 10
    assert system.controller.fleet.loads[FIRST].kv_tokens == 2000


async def test_a_group_that_does_not_serve_has_no_load_and_one_that_is_gone_none_at_all() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.serve.busy = {SECOND: RankLoad(running=5)}
    await system.pass_s(1)
    system.serve.kill_rank(SECOND, 0)
    while system.states()[SECOND] != "lost":
        await system.pass_s(1)
    assert system.controller.fleet is not None
    assert system.controller.fleet.loads[SECOND] == GroupLoad()
    system.gateway.queued = 0
    while SECOND in system.states():
        await system.pass_s(1)
    assert system.controller.fleet.loads.keys() == {FIRST}


async def test_a_group_that_starts_has_a_load_of_zero() -> None:
    system = RunningSystem()
    await system.pass_s(2)
    assert system.states() == {FIRST: "starting"}
    assert system.controller.fleet is not None
    assert system.controller.fleet.loads == {FIRST: GroupLoad()}


# Waking


def wake_report(system: RunningSystem, gateway: str = "g2", waking: int = 1) -> GatewayReport:
    traffic = {MODEL: ModelTraffic(queued_requests=waking, wake_requests=waking)}
    return GatewayReport(gateway, system.clock(), models=traffic)


class TurnCounter:
    """Counts the turns of a loop that runs by the wall clock, its period a minute long."""

    def __init__(self, system: RunningSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("expertmesh.controller.loop._TURN_EVERY_S", 60.0)
        monkeypatch.setattr("expertmesh.controller.loop._SHORTEST_TURN_S", 0.01)
        self.count = 0
        self._turned = asyncio.Event()
        turn = system.controller.turn

        async def counted() -> None:
            await turn()
            self.count += 1
            self._turned.set()

        monkeypatch.setattr(system.controller, "turn", counted)

    async def next(self, within_s: float = 5.0) -> bool:
        """Whether another turn comes."""
        self._turned.clear()
        try:
            await asyncio.wait_for(self._turned.wait(), within_s)
        except TimeoutError:
            return False
        return True


async def test_the_first_request_for_a_sleeping_model_ends_the_pause_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = RunningSystem(two_pools())
    await system.pass_s(8)
    turns = TurnCounter(system, monkeypatch)
    stop = asyncio.Event()
    running = asyncio.create_task(system.controller.run(stop))
    assert await turns.next()
    assert system.states() == {}
    for gateway in ("g1", "g2", "g3"):
        assert system.controller.exchange(wake_report(system, gateway)) is not None
    assert await turns.next()
    assert system.states() == {FIRST: "starting"}
    # The group is on its way: more waiting requests change nothing.
    assert system.controller.exchange(wake_report(system, "g4")) is not None
    assert not await turns.next(within_s=0.3)
    stop.set()
    await running
    assert turns.count == 2
    assert [kind for kind, _ in system.actions()] == ["start"]


async def test_a_wake_that_finds_no_room_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    system = RunningSystem(config(pool("only")), pools={"only": 1})
    await system.pass_s(8)
    turns = TurnCounter(system, monkeypatch)
    stop = asyncio.Event()
    running = asyncio.create_task(system.controller.run(stop))
    assert await turns.next()
    system.controller.exchange(wake_report(system))
    assert await turns.next()
    assert system.pending() == "pending: no room in pool only (1 of 2 workers free)"
    system.controller.exchange(wake_report(system))
    system.controller.exchange(wake_report(system, "g3"))
    assert not await turns.next(within_s=0.3)
    # Once nothing waits any more, the next wake counts again.
    system.controller.exchange(wake_report(system, waking=0))
    system.controller.exchange(wake_report(system, "g3", waking=0))
    await system.controller.turn()
    system.controller.exchange(wake_report(system))
    assert await turns.next()
    stop.set()
    await running


async def test_a_model_whose_last_group_drains_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    system = RunningSystem(two_pools(down_delay_s=3))
    system.gateway.queued = 1
    await system.pass_s(13)
    system.gateway.queued = 0
    system.gateway.in_flight = {FIRST: 1}
    await system.pass_s(1)
    system.gateway.in_flight = {}
    while system.states() != {FIRST: "draining"}:
        await system.pass_s(1)
    turns = TurnCounter(system, monkeypatch)
    stop = asyncio.Event()
    running = asyncio.create_task(system.controller.run(stop))
    assert await turns.next()
    system.controller.exchange(wake_report(system))
    assert await turns.next()
    assert "starting" in system.states().values() or "ready" in system.states().values()
    stop.set()
    await running


async def test_a_report_before_the_first_decision_is_heard() -> None:
    system = RunningSystem(two_pools())
    assert system.controller.exchange(wake_report(system)) is None
    await system.controller.turn()
    assert system.states() == {FIRST: "starting"}


# Draining


async def test_a_drain_waits_for_what_is_in_flight() -> None:
    system = await with_a_draining_group()
    await system.pass_s(20)
    assert SECOND in system.serve.running()
    system.gateway.in_flight = {FIRST: 2}
    await system.pass_s(2)
    assert SECOND not in system.serve.running()


async def test_a_drain_does_not_trust_a_report_from_before_it() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.gateway.queued = 0
    while system.states()[SECOND] != "draining":
        await system.pass_s(1)
    # Idle, but this gateway has not been told yet and may route to the group this very moment.
    assert ("remove", SECOND) not in system.actions()
    await system.controller.turn()
    assert ("remove", SECOND) not in system.actions()
    await system.pass_s(1)
    await system.pass_s(1)
    assert ("remove", SECOND) in system.actions()


async def test_a_drain_waits_for_a_gateway_that_the_answer_did_not_reach() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.gateway.queued = 0
    while system.states()[SECOND] != "draining":
        await system.pass_s(1)
    # It reports, idle, and routes by the old fleet all the same.
    system.gateway.loses_answers = True
    await system.pass_s(10)
    assert SECOND in system.gateway.ready()
    assert ("remove", SECOND) not in system.actions()
    system.gateway.loses_answers = False
    await system.pass_s(2)
    assert ("remove", SECOND) in system.actions()


async def test_the_deadline_ends_a_drain() -> None:
    system = await with_a_draining_group(drain_deadline_s=30)
    await system.pass_s(29)
    assert SECOND in system.serve.running()
    await system.pass_s(2)
    assert SECOND not in system.serve.running()
    assert any("1 in flight at the deadline of 30 s" in reason for reason in system.reasons)


async def test_work_that_comes_back_recalls_the_draining_group() -> None:
    system = await with_a_draining_group()
    system.gateway.queued = 16
    await system.pass_s(5)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert system.actions()[-1] == ("recall", SECOND)


# Losses


async def test_a_dead_rank_takes_its_group_out_within_seconds_until_serve_restarted_it() -> None:
    system = await with_two_groups()
    system.serve.kill_rank(FIRST, 1)
    await system.pass_s(4)
    assert system.states() == {FIRST: "lost", SECOND: "ready"}
    assert system.gateway.ready() == [SECOND]
    assert any("rank 1" in r and "did not answer 3 probes" in r for r in system.reasons)
    puts = len(system.serve.puts)
    await system.pass_s(26)
    assert system.states()[FIRST] == "starting"
    durations = dict(system.recorded_state().start_s)
    await system.pass_s(12)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert len(system.serve.puts) == puts, "the same application came back"
    assert system.recorded_state().start_s == durations, "a restart is no measured start"


async def test_a_lost_host_without_room_is_replaced_in_another_pool() -> None:
    system = await with_one_group()
    system.serve.kill_node("cheap-1")
    await system.pass_s(4)
    assert system.states() == {FIRST: "lost"}
    await system.pass_s(10)
    assert system.states()[SECOND] == "starting"
    assert system.serve.puts[-1] == (SECOND,)
    await system.pass_s(20)
    assert system.states() == {SECOND: "ready"}
    assert system.serve.running() == [SECOND]


async def test_a_lost_host_with_room_beside_it_is_replaced_there_by_serve() -> None:
    system = RunningSystem(config(pool("only", nodes=3), min_groups=1), pools={"only": 3})
    await system.pass_s(13)
    system.serve.kill_node(system.serve.nodes_of("em-tiny-only-1")[0])
    await system.pass_s(4)
    assert system.states() == {"em-tiny-only-1": "lost"}
    await system.pass_s(30)
    assert system.states() == {"em-tiny-only-1": "ready"}
    assert len(system.serve.puts) == 1
    assert "only-2" in system.serve.nodes_of("em-tiny-only-1")


async def test_a_lost_host_without_any_room_is_pending_and_says_so() -> None:
    system = RunningSystem(config(pool("only"), min_groups=1), pools={"only": 2})
    await system.pass_s(13)
    system.serve.kill_node("only-0")
    await system.pass_s(25)
    assert system.states() == {}
    assert system.pending() == "pending: no room in pool only (1 of 2 workers free)"
    assert system.serve.apps == {}
    system.serve.nodes_by_id["only-0"].died_at_s = None
    await system.pass_s(15)
    assert system.states() == {"em-tiny-only-2": "ready"}


async def test_a_gang_that_ray_cannot_place_is_shown_as_pending() -> None:
    cloud = pool("cloud", nodes=4, market=Market.ON_DEMAND)
    system = RunningSystem(config(cloud, min_groups=1), pools={"cloud": 1})
    await system.pass_s(35)
    fleet = system.controller.fleet
    assert fleet is not None
    assert fleet.groups[0].state is GroupState.STARTING
    assert fleet.groups[0].message == "pending: no room in pool cloud"
    # What Ray's autoscaler would do.
    system.serve.nodes_by_id |= FakeServe(system.clock, {"cloud": 2}).nodes_by_id
    await system.pass_s(12)
    assert system.gateway.ready() == ["em-tiny-cloud-1"]


async def test_a_failed_start_backs_off_and_another_pool_is_tried() -> None:
    system = RunningSystem()
    system.serve.failing_pools = {"cheap"}
    await system.pass_s(28)
    assert system.gateway.ready() == [SECOND]
    assert system.actions()[:3] == [("start", FIRST), ("remove", FIRST), ("start", SECOND)]
    assert any("the engine died while starting" in reason for reason in system.reasons)
    # The cheaper pool is tried again, after longer and longer times, while the other one serves.
    failures_s = []
    for _ in range(300):
        await system.pass_s(1)
        assert system.gateway.ready() == [SECOND]
        state = system.recorded_state()
        if "cheap" in state.backoff and state.backoff["cheap"].until_s not in failures_s:
            failures_s.append(state.backoff["cheap"].until_s)
    gaps_s = [later - earlier for earlier, later in pairwise(failures_s)]
    assert len(gaps_s) >= 3
    assert gaps_s == sorted(gaps_s) and gaps_s[-1] > 80
    system.serve.failing_pools = set()
    await system.pass_s(200)
    assert [name.startswith("em-tiny-cheap-") for name in system.states()] == [True]


async def test_a_ray_cluster_that_was_started_anew_gets_its_groups_back() -> None:
    system = await with_one_group()
    system.serve.forget_everything()
    await system.pass_s(30)
    assert list(system.states().values()) == ["ready"]
    assert system.serve.running() == list(system.states())


# What fails around it


async def test_gateways_of_which_one_goes_silent() -> None:
    system = await with_two_groups(down_delay_s=5)
    other = Gateway("g2")
    system.gateways.append(other)
    await system.pass_s(2)
    system.gateway.queued = 0
    other.is_silent = True
    await system.pass_s(58)
    assert list(system.states().values()) == ["ready", "ready"], "no scaling down meanwhile"
    assert any("1 gateway workers are silent" in reason for reason in system.reasons)
    await system.pass_s(20)
    assert system.states() == {FIRST: "ready"}


async def test_a_silent_gateway_holds_a_drain_open_until_the_deadline() -> None:
    system = await with_a_draining_group(drain_deadline_s=40)
    system.gateways.append(Gateway("g2", in_flight={SECOND: 3}))
    await system.pass_s(1)
    system.gateways[1].is_silent = True
    system.gateway.in_flight = {FIRST: 2}
    await system.pass_s(30)
    assert SECOND in system.serve.running()
    await system.pass_s(12)
    assert SECOND not in system.serve.running()


async def test_serve_may_be_out_of_reach_for_a_while() -> None:
    system = await with_two_groups(down_delay_s=5)
    puts = list(system.serve.puts)
    system.gateway.queued = 0
    system.serve.is_down = True
    await system.pass_s(60)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert system.serve.puts == puts
    assert "observe applications" in system.controller.not_ready()
    # The ranks are watched all the same.
    system.serve.kill_rank(FIRST, 0)
    await system.pass_s(4)
    assert system.states() == {FIRST: "lost", SECOND: "ready"}
    system.serve.is_down = False
    await system.pass_s(60)
    assert system.controller.not_ready() == {}
    assert list(system.states().values()) == ["ready"]


async def test_a_put_that_fails_is_tried_again() -> None:
    system = RunningSystem()
    system.serve.refuses_puts = True
    await system.pass_s(5)
    assert system.states() == {FIRST: "starting"}
    assert "apply" in system.controller.not_ready()
    system.serve.refuses_puts = False
    await system.pass_s(14)
    assert system.states() == {FIRST: "ready"}
    assert system.serve.puts == [(FIRST,)]
    assert system.controller.not_ready() == {}


async def test_without_a_journal_nothing_is_done_but_losses_are_still_told() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.journal.is_down = True
    system.gateway.queued = 0
    await system.pass_s(20)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    system.serve.kill_rank(FIRST, 0)
    await system.pass_s(5)
    assert system.gateway.ready() == [SECOND]
    assert "journal" in system.controller.not_ready()
    system.journal.is_down = False
    await system.pass_s(45)
    assert system.controller.not_ready() == {}
    assert list(system.states().values()) == ["ready"]


async def test_an_error_in_one_models_decision_does_not_stop_the_other() -> None:
    broken = other_model(two_pools(target_in_flight_per_group=0), "broken")
    system = RunningSystem(two_pools(min_groups=1), broken)
    await system.pass_s(14)
    assert system.states() == {FIRST: "ready"}
    assert "decide broken" in system.controller.not_ready()


async def test_a_group_that_cannot_be_read_is_not_deleted_by_a_put() -> None:
    system = RunningSystem()
    system.serve.strangers = {"em-other-pool-7": ApplicationStatus.RUNNING}
    await system.pass_s(5)
    assert system.serve.puts == []
    assert "em-other-pool-7" in system.controller.not_ready()["apply"]


async def test_applications_that_are_no_groups_do_not_stop_the_controller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    system = RunningSystem()
    system.serve.strangers = {"someones-app": ApplicationStatus.RUNNING}
    await system.pass_s(14)
    assert system.states() == {FIRST: "ready"}
    assert "someones-app" in caplog.text


# Another controller continues


async def restarted(system: RunningSystem, seconds: int = 1) -> None:
    running, puts = system.serve.running(), len(system.serve.puts)
    restarts = {name: app.restarts for name, app in system.serve.apps.items()}
    system.restart_controller(after_s=20)
    await system.pass_s(seconds)
    assert set(running) <= set(system.serve.running()), "no running group is dropped"
    assert {name: app.restarts for name, app in system.serve.apps.items()} == restarts
    assert system.serve.puts[puts:] == [], "nothing to tell Serve"


async def test_ready_groups_stay_ready_for_the_gateways_across_a_restart() -> None:
    system = await with_two_groups()
    before = system.controller.fleet
    await restarted(system, 10)
    after = system.controller.fleet
    assert before is not None and after is not None
    assert after.groups == before.groups
    assert after.version > before.version


async def test_until_the_first_decision_gateways_keep_the_fleet_that_they_have() -> None:
    system = await with_two_groups()
    kept = system.gateway.fleet
    system.restart_controller()
    system.exchange()
    assert system.gateway.refusals == 2
    assert system.gateway.fleet == kept


async def test_a_start_goes_on_across_a_restart() -> None:
    system = RunningSystem()
    await system.pass_s(6)
    assert system.states() == {FIRST: "starting"}
    await restarted(system, 1)
    await system.pass_s(1)
    assert system.states() == {FIRST: "ready"}
    assert system.actions() == [("start", FIRST)]


async def test_a_drain_goes_on_across_a_restart_with_its_deadline() -> None:
    system = await with_a_draining_group(drain_deadline_s=60)
    await restarted(system, 10)
    assert system.states() == {FIRST: "ready", SECOND: "draining"}
    system.gateway.in_flight = {FIRST: 1}
    await system.pass_s(8)
    assert system.states() == {FIRST: "ready"}


async def test_a_removal_goes_on_across_a_restart() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.gateway.queued = 0
    while ("remove", SECOND) not in system.actions():
        await system.pass_s(1)
    puts = list(system.serve.puts)
    system.restart_controller()
    await system.pass_s(6)
    assert system.states() == {FIRST: "ready"}
    assert system.serve.puts == puts
    assert system.ledger.holds[SECOND].ended_at_s is not None


async def test_a_lost_group_is_waited_for_across_a_restart() -> None:
    system = await with_two_groups()
    system.serve.kill_rank(FIRST, 0)
    await system.pass_s(5)
    assert system.states()[FIRST] == "lost"
    system.restart_controller()
    await system.pass_s(40)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert system.actions() == [("start", FIRST), ("start", SECOND)]


async def test_a_start_that_was_recorded_but_not_done_is_decided_anew() -> None:
    system = RunningSystem()
    system.serve.refuses_puts = True
    await system.pass_s(1)
    assert system.actions() == [("start", FIRST)]
    system.serve.refuses_puts = False
    system.restart_controller()
    await system.pass_s(14)
    assert system.states() == {"em-tiny-cheap-2": "ready"}
    assert system.serve.puts == [("em-tiny-cheap-2",)]


async def test_groups_that_ended_without_a_controller_are_neither_shown_nor_paid_for() -> None:
    """The whole machine was off for an hour."""
    system = await with_two_groups()
    seen_s = system.ledger.holds[SECOND].seen_at_s
    system.serve.forget_everything()
    system.gateway.queued = 0
    system.restart_controller(after_s=3600)
    await system.pass_s(1)
    assert list(system.states()) == ["em-tiny-cheap-3"]
    assert system.ledger.holds[FIRST].ended_at_s == seen_s
    assert system.ledger.holds[SECOND].ended_at_s == seen_s
    await system.pass_s(13)
    assert system.states()["em-tiny-cheap-3"] == "ready"


async def test_without_its_journal_a_controller_adopts_what_runs() -> None:
    system = await with_two_groups()
    system.journal.entries.clear()
    system.restart_controller()
    await system.pass_s(1)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    assert len(system.serve.puts) == 2
    system.gateway.queued = 0
    await system.pass_s(30)
    assert system.states() == {FIRST: "ready"}
    system.gateway.queued = 16
    await system.pass_s(20)
    assert "em-tiny-dear-3" in system.states(), "numbers go on after the adopted ones"


async def test_after_a_restart_nothing_is_removed_before_the_known_gateways_have_reported() -> None:
    system = await with_two_groups(down_delay_s=5)
    other = Gateway("g2")
    system.gateways.append(other)
    # Long enough for a quiet decision to record both gateways.
    await system.pass_s(61)
    system.gateway.queued = 0
    other.is_silent = True
    system.restart_controller()
    await system.pass_s(50)
    assert list(system.states().values()) == ["ready", "ready"]
    other.is_silent = False
    await system.pass_s(6)
    assert system.states()[SECOND] == "draining"


async def test_serve_down_at_the_start_with_a_journal_shows_the_recorded_fleet() -> None:
    system = await with_one_group()
    system.serve.is_down = True
    system.restart_controller()
    await system.pass_s(10)
    assert system.states() == {FIRST: "ready"}
    system.serve.is_down = False
    await system.pass_s(10)
    assert system.states() == {FIRST: "ready"}
    assert len(system.serve.puts) == 1


async def test_serve_down_at_the_start_without_a_journal_shows_no_fleet() -> None:
    system = RunningSystem()
    system.serve.is_down = True
    await system.pass_s(10)
    assert system.controller.fleet is None
    assert system.gateway.refusals == 10


async def test_a_store_out_of_reach_at_the_start_is_waited_for() -> None:
    system = await with_one_group()
    system.journal.is_down = True
    system.restart_controller()
    await system.pass_s(5)
    assert system.controller.fleet is None
    assert "restore" in system.controller.not_ready()
    system.journal.is_down = False
    await system.pass_s(1)
    assert system.states() == {FIRST: "ready"}


async def test_groups_of_a_model_without_a_manifest_are_drained_and_removed() -> None:
    system = await with_one_group()
    other = other_model(two_pools(min_groups=1), "other")
    system.restart_controller(other)
    await system.pass_s(4)
    assert system.states()[FIRST] == "ready", "not before the gateways had time to report"
    await system.pass_s(12)
    assert FIRST not in system.states()
    assert system.states()["em-other-dear-1"] == "ready"
    assert "tiny" not in system.controller.summaries()
    # The cheaper pool has room now.
    await system.pass_s(40)
    assert system.states() == {"em-other-cheap-2": "ready"}


async def test_a_changed_manifest_does_not_restart_running_groups() -> None:
    system = await with_one_group()
    changed = replace(two_pools(min_groups=1), max_model_len=512)
    system.restart_controller(changed)
    await system.pass_s(15)
    assert system.serve.apps[FIRST].restarts == 0
    assert system.serve.apps[FIRST].spec.max_model_len == 1024
    system.gateway.queued = 16
    await system.pass_s(6)
    assert system.serve.apps[FIRST].restarts == 0
    assert system.serve.apps[SECOND].spec.max_model_len == 512


# Two models share the pools


async def test_two_models_share_the_room() -> None:
    tiny = two_pools(min_groups=1)
    system = RunningSystem(tiny, other_model(two_pools(min_groups=2), "other"))
    await system.pass_s(14)
    assert system.states() == {"em-other-cheap-1": "ready", "em-tiny-dear-1": "ready"}
    pending = system.controller.summaries()["other"]["pending"]
    assert pending is not None
    assert "of 2 workers in pool dear tiny (priority 0) has 2" in pending
    assert len(system.serve.puts) == 1


async def test_a_model_of_higher_priority_gets_the_room_of_another() -> None:
    low = two_pools(min_groups=2)
    high = other_model(two_pools(min_groups=1, priority=5), "high")
    system = RunningSystem(low)
    await system.pass_s(14)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    system.restart_controller(low, high)
    await system.pass_s(8)
    assert list(system.states().values()).count("draining") == 1
    assert "high" not in {app.spec.model for app in system.serve.apps.values()}
    await system.pass_s(30)
    ready = system.states()
    assert sorted(name.rpartition("-")[0][:8] for name in ready) == ["em-high-", "em-tiny-"]
    assert set(ready.values()) == {"ready"}
    pending = system.pending()
    assert pending is not None
    assert "high (priority 5) has 2" in pending
    assert any("it makes way" in reason for reason in system.reasons)
    # And it stays like that.
    puts = len(system.serve.puts)
    await system.pass_s(100)
    assert len(system.serve.puts) == puts


async def test_equal_models_do_not_take_from_one_another() -> None:
    first, second = two_pools(min_groups=2), other_model(two_pools(min_groups=2), "other")
    system = RunningSystem(first)
    await system.pass_s(14)
    system.restart_controller(first, second)
    await system.pass_s(60)
    assert system.states() == {FIRST: "ready", SECOND: "ready"}
    pending = system.controller.summaries()["other"]["pending"]
    assert pending is not None
    assert "tiny (priority 0) has 2" in pending


async def test_the_platforms_budget_holds_for_all_models_together() -> None:
    tiny, other = two_pools(min_groups=1), other_model(two_pools(min_groups=1), "other")
    system = RunningSystem(tiny, other, usd_per_hour_budget=1.0)
    for _ in range(30):
        await system.pass_s(1)
        fleet = system.controller.fleet
        assert fleet is not None
        assert sum(group.usd_per_hour for group in fleet.groups) <= 1.0
    assert list(system.states()) == ["em-other-cheap-1"]
    assert system.pending() is not None
    assert "the platform's budget is $1.00/h, of which other (priority 0) has $0.60/h" in str(
        system.pending()
    )
    records = [read_record(e.payload) for e in system.journal.entries if e.kind == "decision"]
    assert any(record.observation.grant is not None for record in records)
    assert all(replay(record).equal for record in records)


# Journal and ledger


async def test_the_journal_of_a_busy_run_replays_to_equal_decisions() -> None:
    system = await with_a_draining_group()
    system.serve.kill_rank(FIRST, 0)
    await system.pass_s(30)
    system.restart_controller()
    await system.pass_s(30)
    records = [read_record(e.payload) for e in system.journal.entries if e.kind == "decision"]
    assert len(records) > 8
    assert all(replay(record).equal for record in records)


async def test_quiet_decisions_are_recorded_once_a_minute() -> None:
    system = await with_one_group()
    count = len(system.journal.entries)
    await system.pass_s(180)
    assert len(system.journal.entries) == count + 3


async def test_capacity_is_held_from_the_request_until_the_group_is_gone() -> None:
    system = await with_two_groups(down_delay_s=5)
    asked_s = system.ledger.holds[SECOND].started_at_s
    assert system.ledger.holds[FIRST].started_at_s == Clock().now_s
    assert system.ledger.holds[SECOND].usd_per_hour == 0.9
    system.gateway.queued = 0
    while SECOND in system.states():
        await system.pass_s(1)
    hold = system.ledger.holds[SECOND]
    assert hold.started_at_s == asked_s
    assert hold.ended_at_s == system.clock() - 1
    assert system.ledger.holds[FIRST].ended_at_s is None


async def test_a_killed_controller_loses_at_most_seconds_of_the_cost() -> None:
    system = await with_one_group()
    for _ in range(20):
        await system.pass_s(1)
        assert system.clock() - system.ledger.holds[FIRST].seen_at_s <= 6


async def test_a_ledger_out_of_reach_gets_the_ends_later() -> None:
    system = await with_two_groups(down_delay_s=5)
    system.ledger.is_down = True
    system.gateway.queued = 0
    await system.pass_s(20)
    assert system.states() == {FIRST: "ready"}
    assert "capacity ledger" in system.controller.not_ready()
    system.ledger.is_down = False
    await system.pass_s(1)
    assert system.ledger.holds[SECOND].ended_at_s is not None
    assert system.controller.not_ready() == {}
    writes = system.ledger.writes
    await system.pass_s(10)
    assert system.ledger.writes == writes + 2


async def test_holds_of_groups_that_ended_without_a_controller_are_closed() -> None:
    system = await with_two_groups()
    seen_s = system.ledger.holds[SECOND].seen_at_s
    system.journal.entries.clear()
    del system.serve.apps[SECOND]
    system.restart_controller(after_s=100)
    await system.pass_s(2)
    assert system.ledger.holds[SECOND].ended_at_s == seen_s
    assert system.ledger.holds[FIRST].ended_at_s is None


async def test_metrics_tell_groups_demand_and_money() -> None:
    system = await with_two_groups()
    system.gateway.in_flight = {FIRST: 3}
    await system.pass_s(1)
    text = system.controller.metrics.text().decode()
    assert 'em_controller_groups{model="tiny",pool="cheap",state="ready"} 1.0' in text
    assert 'em_controller_desired_groups{model="tiny"} 2.0' in text
    assert 'em_controller_demand_requests{model="tiny"} 19.0' in text
    starts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('em_controller_decisions_total{model="tiny",action="start",binding=')
    ]
    assert sum(starts) == 2
    assert 'em_controller_spend_usd_per_hour{model="tiny",pool="dear"} 0.9' in text
    assert 'em_controller_group_start_seconds_count{model="tiny",pool="cheap"} 1.0' in text
    assert 'em_controller_gateway_report_age_seconds{gateway="g1"} 0.0' in text
    spent = next(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('em_controller_spend_usd_total{model="tiny",pool="cheap"}')
    )
    held_s = system.clock() - 1 - system.ledger.holds[FIRST].started_at_s
    assert spent == pytest.approx(0.6 * held_s / 3600)


async def test_the_wire_format_of_the_fleet_is_plain_json() -> None:
    system = await with_one_group()
    text = msgspec.json.encode(system.controller.fleet)
    assert b'"state":"ready"' in text
