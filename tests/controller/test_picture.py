import pytest
from tests.controller.running_system import RunningSystem

from expertmesh.controller.loads import EngineLoads
from expertmesh.controller.picture import Picture, expert_heat
from expertmesh.core.domain.fleet import GroupState, RankInfo


async def _picture(system: RunningSystem) -> Picture:
    picture = system.controller.picture()
    assert picture is not None
    return picture


async def test_before_the_first_decision_there_is_none() -> None:
    assert RunningSystem().controller.picture() is None


async def test_it_shows_pools_nodes_groups_and_ranks() -> None:
    system = RunningSystem()
    await system.pass_s(20)
    picture = await _picture(system)
    cheap, dear = picture.pools
    assert [node.id for node in cheap.nodes or ()] == ["cheap-0", "cheap-1"]
    assert (cheap.groups_usd_per_hour, cheap.idle_usd_per_hour) == (0.6, 0.0)
    assert (dear.groups_usd_per_hour, dear.idle_usd_per_hour) == (0.0, 0.9)
    assert picture.usd_per_hour == pytest.approx(1.5)
    (group,) = picture.groups
    assert (group.name, group.state, group.data) == ("em-tiny-cheap-1", "ready", 2)
    assert [rank.node for rank in group.ranks] == ["cheap-0", "cheap-1"]
    assert all(rank.answered_at_s is not None for rank in group.ranks)
    (model,) = picture.models
    assert (model.name, model.wanted, model.ready) == ("tiny", 1, 1)
    assert system.clock() - picture.turned_at_s == 1.0


async def test_a_group_that_starts_costs_and_has_ranks_without_answers() -> None:
    system = RunningSystem()
    await system.pass_s(3)
    (group,) = (await _picture(system)).groups
    assert group.state == "starting"
    assert [rank.answered_at_s for rank in group.ranks] == [None, None]


async def test_what_cannot_be_seen_is_not_known() -> None:
    system = RunningSystem()
    await system.pass_s(20)
    system.serve.is_down = True
    await system.pass_s(1)
    picture = await _picture(system)
    assert [pool.nodes for pool in picture.pools] == [None, None]
    assert [pool.idle_usd_per_hour for pool in picture.pools] == [None, None]
    assert picture.usd_per_hour == pytest.approx(0.6)
    assert picture.groups[0].state == "ready"


async def test_a_dead_node_is_shown_no_more() -> None:
    system = RunningSystem()
    await system.pass_s(20)
    system.serve.nodes_by_id["dear-0"].died_at_s = system.clock() - 60
    await system.pass_s(1)
    _, dear = (await _picture(system)).pools
    assert [node.id for node in dear.nodes or ()] == ["dear-1"]
    assert dear.idle_usd_per_hour == 0.45


def _info(rank: int, started_at_s: float = 0.0, **experts: int) -> RankInfo:
    tokens = {name.removeprefix("e"): count for name, count in experts.items()}
    return RankInfo(
        "em-tiny-cheap-1",
        "tiny",
        rank,
        2,
        0,
        0,
        0.0,
        expert_tokens=tokens,
        started_at_s=started_at_s,
    )


async def test_heat_is_of_the_last_seconds_and_else_since_the_start() -> None:
    system = RunningSystem()
    await system.pass_s(20)
    (record,) = system.recorded_state().groups
    assert record.state is GroupState.READY
    engines = EngineLoads()
    at = {"a": 0.0, "b": 0.0}
    assert expert_heat([record], engines) == {}
    engines.saw({"a": _info(0, e0=10, e1=30), "b": _info(1, e2=40, e3=0)}, at)
    heat = expert_heat([record], engines)["em-tiny-cheap-1"]
    assert (heat.lately, heat.imbalance) == (False, 1.0)
    assert heat.ranks == {0: {"0": 10, "1": 30}, 1: {"2": 40, "3": 0}}
    later = {"a": 5.0, "b": 5.0}
    engines.saw({"a": _info(0, e0=10, e1=90), "b": _info(1, e2=60, e3=0)}, later)
    heat = expert_heat([record], engines)["em-tiny-cheap-1"]
    assert heat.lately
    assert heat.ranks == {0: {"0": 0, "1": 60}, 1: {"2": 20, "3": 0}}
    assert heat.imbalance == 1.5


async def test_experts_that_were_never_asked_have_no_balance() -> None:
    system = RunningSystem()
    await system.pass_s(20)
    (record,) = system.recorded_state().groups
    engines = EngineLoads()
    engines.saw({"a": _info(0, e0=0)}, {"a": 0.0})
    assert expert_heat([record], engines)["em-tiny-cheap-1"].imbalance is None
