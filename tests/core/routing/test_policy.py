from dataclasses import replace

import pytest

from expertmesh.core.domain.fleet import Fleet, Group, GroupState, Rank, ServedModel
from expertmesh.core.routing.policy import (
    Attempt,
    Candidate,
    Load,
    RoutingConfig,
    candidates_by_model,
    choose,
)

CONFIG = RoutingConfig()
IDLE = Load({}, {}, {})


def candidate(group: str, rank: int, group_ranks: int = 2) -> Candidate:
    return Candidate(group, "pool-a", rank, f"http://{group}/{rank}", group_ranks)


A0, A1, B0, B1 = candidate("a", 0), candidate("a", 1), candidate("b", 0), candidate("b", 1)
ALL = (A0, A1, B0, B1)


def load(**in_flight: int) -> Load:
    """By rank, e.g. a0=1; the groups' counts follow."""
    groups: dict[str, int] = {}
    for name, count in in_flight.items():
        groups[name[0]] = groups.get(name[0], 0) + count
    return Load({f"http://{n[0]}/{n[1]}": c for n, c in in_flight.items()}, groups, {})


@pytest.mark.parametrize("turn", range(8))
def test_least_loaded_rank_wins_whatever_the_turn(turn: int) -> None:
    assert choose(CONFIG, ALL, load(a0=3, a1=2, b0=1, b1=2), (), turn, 0.0) == B0


def test_ties_rotate_evenly() -> None:
    chosen = [choose(CONFIG, ALL, IDLE, (), turn, 0.0) for turn in range(8)]
    assert all(chosen.count(one) == 2 for one in ALL)


@pytest.mark.parametrize("turn", range(8))
def test_between_idle_ranks_the_group_with_less_work_wins(turn: int) -> None:
    assert choose(CONFIG, ALL, load(a0=2, b0=1), (), turn, 0.0) == B1


@pytest.mark.parametrize("turn", range(6))
def test_the_work_of_a_large_group_is_counted_per_rank(turn: int) -> None:
    large = tuple(candidate("a", n, 4) for n in range(4))
    small = (candidate("b", 0, 1),)
    both = load(a0=1, a1=1, a2=1, b0=1)
    assert choose(CONFIG, large + small, both, (), turn, 0.0) == large[3]
    full = load(a0=1, a1=1, a2=1, a3=2, b0=1)
    chosen = choose(CONFIG, large[3:] + small, full, (), turn, 0.0)
    assert chosen == small[0]


@pytest.mark.parametrize("turn", range(4))
def test_a_group_that_failed_cools_down_while_there_is_another(turn: int) -> None:
    cooling = replace(load(b0=5, b1=5), cooling_until_s={"a": 10.0})
    assert choose(CONFIG, ALL, cooling, (), turn, 9.9).group == "b"
    assert choose(CONFIG, ALL, cooling, (), turn, 10.0).group == "a"
    assert choose(CONFIG, (A0, A1), cooling, (), turn, 9.9).group == "a"


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("connection_failed", [True, False])
def test_the_second_attempt_goes_to_another_group(turn: int, connection_failed: bool) -> None:
    busy = load(b0=9, b1=8)
    assert choose(CONFIG, ALL, busy, (Attempt(A0, connection_failed),), turn, 0.0) == B1


def test_without_another_group_only_a_failed_connection_leads_to_another_rank() -> None:
    assert choose(CONFIG, (A0, A1), IDLE, (Attempt(A0, True),), 0, 0.0) == A1
    assert choose(CONFIG, (A0, A1), IDLE, (Attempt(A0, False),), 0, 0.0) is None
    assert choose(CONFIG, (A0,), IDLE, (Attempt(A0, True),), 0, 0.0) is None


def test_no_third_attempt_and_no_candidates() -> None:
    twice = (Attempt(A0, True), Attempt(B0, True))
    assert choose(CONFIG, ALL, IDLE, twice, 0, 0.0) is None
    assert choose(CONFIG, (), IDLE, (), 0, 0.0) is None


def test_only_ready_groups_of_known_models_give_candidates() -> None:
    model = ServedModel("m", 4096, 0.1, 0.1, 0.1, 0.0)
    ranks = (Rank(0, "http://h/0"), Rank(1, "http://h/1"))
    groups = tuple(Group(f"em-m-{state.value}", "m", "p", state, ranks) for state in GroupState)
    other = Group("em-x-0", "x", "p", GroupState.READY, ranks)
    table = candidates_by_model(Fleet(1, (model, replace(model, name="idle")), (*groups, other)))
    assert set(table) == {"m", "idle"}
    assert table["idle"] == ()
    assert [(c.group, c.rank, c.base_url, c.group_ranks) for c in table["m"]] == [
        ("em-m-ready", 0, "http://h/0", 2),
        ("em-m-ready", 1, "http://h/1", 2),
    ]
