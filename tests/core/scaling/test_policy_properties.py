"""What must hold for every course of events, with courses that hypothesis makes up."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.scaling.world import EP2, World, config, pool

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import ActionKind, Decision, workers_of
from expertmesh.core.scaling.lifecycle import LEGAL
from expertmesh.core.scaling.replay import read_record, replay

WORKERS = workers_of(EP2)
RENEWED = {ActionKind.DRAIN, ActionKind.REMOVE}

events = st.one_of(
    st.tuples(st.just("work"), st.integers(0, 60)),
    st.tuples(st.just("pass"), st.integers(1, 25)),
    st.tuples(st.just("mute"), st.integers(0, 3)),
    st.tuples(st.just("fail cheap"), st.booleans()),
    st.tuples(st.just("cheap workers"), st.integers(0, 6)),
    st.tuples(st.just("silence"), st.just(0)),
    st.tuples(st.just("gateway"), st.just(0)),
    st.tuples(st.just("serve"), st.booleans()),
    st.tuples(st.just("journal"), st.booleans()),
)
bounds = st.tuples(st.integers(0, 3), st.integers(1, 4)).map(
    lambda pair: (min(pair), max(pair[1], pair[0], 1))
)
budgets = st.one_of(st.none(), st.sampled_from([0.7, 1.3, 1.9, 3.0]))


def live(course: list[tuple[str, int]], low: int, high: int, budget: float | None) -> World:
    """Run the course; the properties of single decisions are checked on the way."""
    pools = (pool("cheap", 0.3, nodes=6), pool("dear", 0.45, nodes=4))
    world = World(
        config(*pools, min_groups=low, max_groups=high, usd_per_hour_budget=budget), start_s=7
    )
    work, gateways = 0, 1
    for kind, value in course:
        match kind:
            case "work":
                work = value
            case "mute":
                for name in sorted(world.running)[value : value + 1]:
                    world.running[name].mute = True
            case "fail cheap":
                world.failing_pools = {"cheap"} if value else set()
            case "cheap workers":
                world.live = {"cheap": value}
            case "silence":
                for name in world.gateways[-1:]:
                    world.silence(name, queued=work)
            case "gateway":
                gateways += 1
                world.gateways = (*world.gateways, f"g{gateways}")
            case "serve":
                world.serve_answers = bool(value)
            case "journal":
                world.journal_writes = bool(value)
        for _ in range(value if kind == "pass" else 1):
            serving = world.serving
            decision = world.step(queued=work)
            check(world, decision, serving, high, budget)
    return world


def check(
    world: World, decision: Decision, serving: list[str], high: int, budget: float | None
) -> None:
    state = decision.state
    routable = [record for record in state.groups if record.removed_at_s is None]
    assert len(routable) <= high, "never above max"
    started = [a.spec for a in decision.actions if a.kind is ActionKind.START and a.spec]
    if started:
        cost = sum(record.spec.usd_per_hour for record in state.groups)
        assert budget is None or cost <= budget + 1e-3, "never a start above the budget"
        for spec in started:
            used = sum(WORKERS for record in state.groups if record.spec.pool == spec.pool)
            room = world.live.get(spec.pool, {"cheap": 6, "dear": 4}[spec.pool])
            assert used <= room, "never a start without room"
    acts = {action.kind for action in decision.actions}
    observation = world.records[-1].observation
    silent = any(
        5 < decision_age(world, heard_s) <= 60
        for heard_s in [gateway.heard_at_s for gateway in observation.gateways]
    )
    if silent or not decision.demand.live_gateways:
        assert ActionKind.DRAIN not in acts, "no drain on stale reports"
        assert state.wanted >= world.records[-1].before.wanted
    if not (observation.serve_answers and observation.journal_writes):
        assert not acts, "no action while anything is unknown"
    drained = sum(action.kind is ActionKind.DRAIN for action in decision.actions)
    if drained and budget is None:
        lost = sum(step.before is GroupState.READY for step in decision.transitions) - drained
        arrived = sum(step.after is GroupState.READY for step in decision.transitions)
        left = len(serving) + arrived - lost - drained
        assert left >= state.wanted, "a needed ready group is not drained"
    for step in decision.transitions:
        if step.before is not None:
            assert step.after in LEGAL[step.before]
    for record in state.groups:
        if record.state is GroupState.READY:
            assert len(record.ranks) == record.spec.parallelism.data
    assert decision.wake_at_s > world.records[-1].now_s
    assert decision.reason


def decision_age(world: World, heard_at_s: float) -> float:
    return world.records[-1].now_s - heard_at_s


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=30), bounds, budgets)
def test_single_decisions_keep_the_rules(
    course: list[tuple[str, int]], low_high: tuple[int, int], budget: float | None
) -> None:
    live(course, *low_high, budget)


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=20), bounds, budgets)
def test_every_recorded_decision_replays_equal(
    course: list[tuple[str, int]], low_high: tuple[int, int], budget: float | None
) -> None:
    world = live(course, *low_high, budget)
    for record in world.records:
        text = msgspec.json.encode(record.to_payload())
        again = read_record(msgspec.json.decode(text))
        assert again == record
        assert replay(again).equal


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=20), bounds, st.integers(0, 40))
def test_after_any_course_a_quiet_world_settles_at_what_is_needed(
    course: list[tuple[str, int]], low_high: tuple[int, int], work: int
) -> None:
    low, high = low_high
    world = live(course, low, high, None)
    world.serve_answers = world.journal_writes = True
    world.failing_pools, world.live = set(), {}
    world.gateways = ("fresh",)
    for run in world.running.values():
        run.mute = False
    # Longer than every delay, deadline and back-off together.
    world.steps(900, queued=work)
    wanted = max(low, min(high, -(-work // 8)))
    assert len(world.serving) == wanted, "never below the need or min while there is room"
    assert len(world.state.groups) == wanted
    before = world.state
    decisions = world.steps(60, queued=work)
    assert all(not decision.actions for decision in decisions), "constant work moves nothing"
    assert world.state.groups == before.groups


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=20), bounds, budgets)
def test_names_are_unique_and_numbers_only_grow(
    course: list[tuple[str, int]], low_high: tuple[int, int], budget: float | None
) -> None:
    world = live(course, *low_high, budget)
    started = [
        action.group
        for record in world.records
        for action in record.decision.actions
        if action.kind is ActionKind.START
    ]
    numbers = [int(name.rpartition("-")[2]) for name in started]
    assert numbers == sorted(set(numbers))
