from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.routing.fleets import (
    chosen,
    fleet,
    group,
    model,
    rank_of,
    route,
    router,
    send,
    url,
)

from expertmesh.core.domain.fleet import Fleet, GroupLoad, GroupState
from expertmesh.core.routing.candidate import Attempt, Candidate, candidates_by_model
from expertmesh.core.routing.external import ExternalAsk
from expertmesh.core.routing.health import Evidence
from expertmesh.core.routing.prefix import prefix_blocks
from expertmesh.core.routing.router import Router, RoutingConfig

PROMPT = prefix_blocks(bytes(range(256)) * 16)
OTHER_PROMPT = prefix_blocks(bytes(reversed(range(256))) * 16)


def eject(made: Router, name: str, evidence: Evidence, now_s: float = 0.0) -> None:
    (sent,) = send(made, **{name: 1})
    made.end(sent, now_s, evidence)


# Load


def test_least_loaded_rank_wins_whatever_the_turn() -> None:
    made = router(group("a"), group("b"))
    send(made, a0=3, a1=2, b0=1, b1=2)
    assert {chosen(made) for _ in range(8)} == {"b0"}


def test_ties_rotate_evenly() -> None:
    made = router(group("a"), group("b"))
    assert Counter(chosen(made) for _ in range(8)) == dict.fromkeys(("a0", "a1", "b0", "b1"), 2)


def test_between_idle_ranks_the_group_with_less_work_wins() -> None:
    made = router(group("a"), group("b"))
    send(made, a0=2, b0=1)
    assert {chosen(made) for _ in range(8)} == {"b1"}


def test_the_work_of_a_large_group_is_counted_per_rank() -> None:
    made = router(group("a", 4), group("b", 1))
    send(made, a0=1, a1=1, a2=1, b0=1)
    assert {chosen(made) for _ in range(8)} == {"a3"}
    send(made, a3=2)
    assert {chosen(made) for _ in range(8)} == {"b0"}, "1.25 requests a rank are more than 1"
    made = router(group("a", 4), group("b", 2))
    send(made, a0=1, a1=1, a2=1, a3=1, b0=1, b1=2)
    assert "b0" not in {chosen(made) for _ in range(12)}, "3 on 2 ranks are more than 4 on 4"


def test_with_equal_requests_a_group_whose_engines_queue_is_avoided() -> None:
    made = router(group("a"), group("b"))
    groups = (group("a"), group("b"))
    made.apply(fleet(groups, {"a": GroupLoad(waiting=1), "b": GroupLoad(kv_usage=0.99)}))
    send(made, b0=1)
    assert {chosen(made) for _ in range(8)} == {"b1"}, "though the group has more requests"
    made.apply(fleet(groups, {"a": GroupLoad(), "b": GroupLoad()}))
    assert {chosen(made) for _ in range(8)} == {"a0", "a1"}
    made.apply(fleet(groups))
    assert {chosen(made) for _ in range(8)} == {"a0", "a1"}


def test_with_all_else_equal_the_group_with_more_free_kv_cache_wins() -> None:
    made = router(group("a"), group("b"))
    groups = (group("a"), group("b"))
    made.apply(fleet(groups, {"a": GroupLoad(kv_usage=0.85), "b": GroupLoad(kv_usage=0.61)}))
    assert {chosen(made) for _ in range(8)} == {"b0", "b1"}
    send(made, b0=1, b1=1, a0=1, a1=2)
    assert {chosen(made) for _ in range(8)} == {"b0", "b1"}
    made = router(*groups)
    made.apply(fleet(groups, {"a": GroupLoad(kv_usage=0.62), "b": GroupLoad(kv_usage=0.68)}))
    assert len({chosen(made) for _ in range(8)}) == 4, "a small difference decides nothing"


def test_ended_requests_count_no_more_and_changes_of_the_fleet_keep_the_counts() -> None:
    made = router(group("a"))
    sent = send(made, a0=2, a1=1)
    made.apply(fleet((group("a"), group("b", 1))))
    send(made, b0=3)
    assert {chosen(made) for _ in range(6)} == {"a1"}
    for one in sent[:2]:
        made.end(one, 0.0)
    assert {chosen(made) for _ in range(6)} == {"a0"}


def test_a_group_that_drains_gets_nothing_and_its_requests_end_well() -> None:
    made = router(group("a"), group("b"))
    sent = send(made, a0=2)
    made.apply(fleet((group("a", state=GroupState.DRAINING), group("b"))))
    send(made, b0=5, b1=5)
    assert {chosen(made) for _ in range(4)} == {"b0", "b1"}
    made.end(sent[0], 0.0)
    made.apply(fleet((group("a"), group("b"))))
    assert {chosen(made) for _ in range(4)} == {"a1"}, "one request is still there"
    made.end(sent[1], 0.0)
    assert {chosen(made) for _ in range(4)} == {"a0", "a1"}


def test_an_address_that_another_group_has_now_starts_with_no_requests() -> None:
    made = router(group("a", 1), group("b", 1))
    sent = send(made, a0=3)
    taken = replace(group("c", 1), ranks=group("a", 1).ranks)
    made.apply(fleet((taken, group("b", 1))))
    send(made, b0=1)
    assert {chosen(made) for _ in range(4)} == {"c0"}
    for one in sent:
        made.end(one, 0.0)
    (other,) = send(made, c0=1)
    assert {chosen(made) for _ in range(4)} == {"b0", "c0"}
    made.end(other, 0.0)
    assert {chosen(made) for _ in range(4)} == {"c0"}


def test_a_request_for_the_group_that_had_an_address_before_does_not_count_for_the_new_one() -> (
    None
):
    made = router(group("a", 1), group("b", 1))
    old = rank_of(made, "a", 0)
    made.apply(fleet((replace(group("c", 1), ranks=group("a", 1).ranks), group("b", 1))))
    sent = made.begin(old)
    assert {chosen(made) for _ in range(4)} == {"b0", "c0"}
    made.end(sent, 0.0, Evidence.STALL)
    assert {chosen(made) for _ in range(4)} == {"b0", "c0"}


def test_a_request_for_a_rank_that_left_ends_well_too() -> None:
    made = router(group("a", 1), group("b", 1))
    candidate = rank_of(made, "a", 0)
    made.apply(fleet((group("b", 1),)))
    made.end(made.begin(candidate), 0.0, Evidence.RESET)
    assert chosen(made) == "b0" and len(made.health) == 0


def test_no_candidates() -> None:
    made = router(group("a", state=GroupState.STARTING))
    assert not made.is_ready("m") and not made.wants_affinity("m")
    assert made.choose("m") is None and made.choose("unknown") is None
    assert made.choose("m", (Attempt(Candidate("x", "p", 0, "http://x", 1), True),)) is None


def test_a_single_candidate_is_taken_unless_it_is_ejected() -> None:
    made = router(group("a", 1))
    assert made.is_ready("m") and not made.wants_affinity("m")
    assert chosen(made, session=b"s", blocks=PROMPT) == "a0"
    eject(made, "a0", Evidence.STALL)
    assert chosen(made) is None, "it is worth to wait for its probe"
    made.apply(fleet((group("a", 1), group("b", 1))))
    assert made.wants_affinity("m") and chosen(made) == "b0"


def test_only_ready_groups_of_known_models_give_candidates() -> None:
    groups = tuple(group(state.value, state=state) for state in GroupState)
    stranger = group("x", model="x")
    table = candidates_by_model(Fleet(1, (model(), model("idle")), (*groups, stranger)))
    assert set(table) == {"m", "idle"} and table["idle"] == ()
    assert [(c.group, c.rank, c.base_url, c.group_ranks, c.external) for c in table["m"]] == [
        ("ready", 0, url("ready", 0), 2, None),
        ("ready", 1, url("ready", 1), 2, None),
    ]


# Room


def test_a_full_group_gets_nothing_new_and_when_all_are_full_the_call_waits() -> None:
    made = router(group("a"), group("b"))
    send(made, b0=5, b1=5)
    made.set_full("a", True)
    assert {chosen(made) for _ in range(4)} == {"b0", "b1"}
    assert {(chosen(made, session=b"s-%d" % n) or "")[0] for n in range(40)} == {"b"}
    made._tables["m"].index.record(PROMPT, made._tables["m"].ranks[0].bit)
    assert (chosen(made, blocks=PROMPT) or "")[0] == "b"
    made.set_full("b", True)
    assert chosen(made) is None and chosen(made, session=b"s") is None
    assert chosen(made, blocks=PROMPT) is None
    made.apply(fleet((group("a"), group("b"), group("c", 1))))
    assert {chosen(made) for _ in range(4)} == {"c0"}, "full groups stay full"
    made.set_full("c", True)
    made.set_full("a", False)
    assert {chosen(made) for _ in range(4)} == {"a0", "a1"}
    made.set_full("unknown", True)


def test_a_single_candidate_may_be_full_too() -> None:
    made = router(group("a", 1))
    made.set_full("a", True)
    assert chosen(made) is None and not made.wants_affinity("m")
    made.set_full("a", False)
    assert chosen(made) == "a0"


def test_what_is_ejected_does_not_serve_while_the_sound_ones_are_full() -> None:
    made = router(group("a", 1), group("b", 1), group("c", 1))
    eject(made, "a0", Evidence.RESET)
    for name in "bc":
        made.set_full(name, True)
    assert chosen(made) is None
    assert chosen(made, (Attempt(rank_of(made, "c", 0), True),)) is None
    made.health.probe_ok(url("a", 0))
    assert chosen(made) == "a0"
    made.set_full("a", True)
    assert chosen(made) is None


def test_a_busy_rank_is_avoided_and_worth_a_wait_when_nothing_else_is_sound() -> None:
    made = router(group("a"))
    eject(made, "a0", Evidence.BUSY)
    assert {chosen(made) for _ in range(4)} == {"a1"}
    eject(made, "a1", Evidence.RESET)
    assert chosen(made) is None
    assert chosen(made, (Attempt(rank_of(made, "a", 1), True),)) is None
    both = router(group("a", 2), group("b", 1))
    eject(both, "b0", Evidence.BUSY)
    eject(both, "a0", Evidence.RESET)
    eject(both, "a1", Evidence.RESET)
    assert chosen(both, (Attempt(rank_of(both, "a", 1), True),)) is None
    (busy,) = (c for c in made.due_probes(0.5) if c.rank == 0)
    made.health.probe_ok(busy.base_url)
    assert {chosen(made) for _ in range(4)} == {"a0"}


# Second attempts


@pytest.mark.parametrize("connection_failed", [True, False])
def test_the_second_attempt_goes_to_another_group(connection_failed: bool) -> None:
    made = router(group("a"), group("b"))
    send(made, b0=9, b1=8)
    failed = Attempt(rank_of(made, "a", 0), connection_failed)
    assert {chosen(made, (failed,)) for _ in range(4)} == {"b1"}


def test_without_another_group_only_a_failed_connection_leads_to_another_rank() -> None:
    made = router(group("a"))
    first = rank_of(made, "a", 0)
    assert chosen(made, (Attempt(first, True),)) == "a1"
    assert chosen(made, (Attempt(first, False),)) is None
    alone = router(group("a", 1))
    assert chosen(alone, (Attempt(first, True),)) is None


def test_a_sound_rank_of_the_same_group_is_better_than_another_group_that_is_ejected() -> None:
    made = router(group("a"), group("b"))
    eject(made, "b0", Evidence.STALL)
    eject(made, "a0", Evidence.REFUSED)
    first = rank_of(made, "a", 0)
    assert {chosen(made, (Attempt(first, True),)) for _ in range(4)} == {"a1"}
    assert chosen(made, (Attempt(first, False),)) is None


def test_a_second_attempt_is_no_trial_while_there_is_a_healthy_rank() -> None:
    made = router(group("a", 1), group("b", 1), group("c", 1))
    eject(made, "b0", Evidence.RESET)
    made.health.probe_ok(url("b", 0))
    failed = (Attempt(rank_of(made, "a", 0), True),)
    assert {chosen(made, failed) for _ in range(4)} == {"c0"}
    eject(made, "c0", Evidence.RESET)
    assert {chosen(made, failed) for _ in range(4)} == {"b0"}, "its probe was good"


def test_no_third_attempt() -> None:
    made = router(group("a"), group("b"), group("c"))
    twice = (Attempt(rank_of(made, "a", 0), True), Attempt(rank_of(made, "b", 0), True))
    assert chosen(made, twice) is None
    made.set_full("b", True)
    assert chosen(made, twice[:1]) in ("c0", "c1")
    thrice = router(group("a"), group("b"), group("c"), config=RoutingConfig(max_attempts=3))
    assert chosen(thrice, twice) in ("c0", "c1")


# Affinity


def test_a_session_stays_with_its_rank_while_that_is_not_over_the_bound() -> None:
    made = router(group("a", 4), group("b", 4))
    home = chosen(made, session=b"s-1") or ""
    assert {chosen(made, session=b"s-1") for _ in range(9)} == {home}
    (_, second) = send(made, **{home: 2})
    assert chosen(made, session=b"s-1") != home, "2 > 1.25 * 2 / 8 + 1"
    made.end(second, 0.0)
    assert chosen(made, session=b"s-1") == home


def test_workers_agree_on_a_sessions_rank_whatever_they_have_done_before() -> None:
    one, other = router(group("a", 4)), router(group("a", 4))
    chosen(other), chosen(other, session=b"before")
    sessions = [f"s-{n}".encode() for n in range(200)]
    ranks = [chosen(one, session=session) for session in sessions]
    assert ranks == [chosen(other, session=session) for session in sessions]
    assert len(set(ranks)) == 4


def test_a_sessions_next_rank_is_stable_while_its_own_is_ejected() -> None:
    made = router(group("a", 4), group("b", 4))
    home = chosen(made, session=b"s-1") or ""
    eject(made, home, Evidence.REFUSED)
    away = {chosen(made, session=b"s-1") for _ in range(8)}
    assert len(away) == 1 and home not in away


def test_a_prompt_goes_where_its_beginning_was_and_a_new_one_to_the_least_loaded() -> None:
    made = router(group("a", 4), group("b", 4))
    home = chosen(made, blocks=PROMPT)
    assert {chosen(made, blocks=PROMPT[:5]) for _ in range(9)} == {home}
    send(made, a0=1, a1=1, a2=1, a3=1, b0=1, b1=1, b2=1)
    assert chosen(made, blocks=OTHER_PROMPT) == "b3"


def test_a_match_must_be_worth_the_load() -> None:
    made = router(group("a", 2), config=RoutingConfig(slack_requests=8.0))
    home = chosen(made, blocks=PROMPT) or ""
    longer = (*PROMPT, *range(len(PROMPT) * 9))
    send(made, **{home: 4})  # load 4 / 10.5 of the bound, costs 0.19
    assert chosen(made, blocks=PROMPT) == home
    assert chosen(made, blocks=longer) != home, "a tenth is not worth it"


def test_a_match_in_a_group_that_queues_must_be_long() -> None:
    groups = (group("a", 1), group("b", 1))
    made = router(*groups)
    home = chosen(made, blocks=PROMPT) or ""
    made.apply(fleet(groups, {home[0]: GroupLoad(waiting=3)}))
    assert chosen(made, blocks=PROMPT) == home
    assert chosen(made, blocks=(*PROMPT, *range(2 * len(PROMPT)))) != home


def test_a_rank_that_is_ejected_draws_no_prompts() -> None:
    made = router(group("a", 2), group("b", 2))
    home = chosen(made, blocks=PROMPT) or ""
    eject(made, home, Evidence.RESET)
    assert home not in {chosen(made, blocks=PROMPT) for _ in range(8)}


def test_a_session_whose_ranks_are_all_over_the_bound_goes_by_its_prefix() -> None:
    made = router(*(group(name, 4) for name in "abcd"))
    order = made._order(made._tables["m"], b"s-1")
    free = [rank for rank in made._tables["m"].ranks if rank not in order]
    assert len(free) == 8
    made._tables["m"].index.record(PROMPT, free[1].bit)
    send(made, **{f"{r.candidate.group}{r.candidate.rank}": 9 for r in order})
    for _ in range(4):
        assert made.choose("m", (), b"s-1", PROMPT) == free[1].candidate


def test_a_session_counts_more_than_a_prefix_and_leaves_no_trace_in_the_index() -> None:
    made = router(group("a", 4), group("b", 4))
    home = chosen(made, session=b"s-1")
    for other in range(100):
        chosen(made, session=b"s-%d" % other, blocks=PROMPT)
    assert chosen(made, session=b"s-1", blocks=PROMPT) == home
    assert len(made._tables["m"].index) == 0


names = st.sets(st.sampled_from("abcdef"), min_size=1)
sessions = st.integers(0, 40)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("fleet"), names),
        st.tuples(st.just("session"), sessions),
        st.tuples(st.just("prompt"), st.integers(0, 5)),
        st.tuples(st.just("any"), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 200)),
        st.tuples(st.just("fail"), st.integers(0, 200)),
        st.tuples(st.just("probe"), st.just(0)),
    ),
    max_size=120,
)


@given(steps)
def test_loads_stay_bounded_and_counts_exact_for_every_course(
    course: list[tuple[str, object]],
) -> None:
    config = RoutingConfig()
    made = router(group("a"), group("b"), config=config)
    open_requests = []
    prompts = [prefix_blocks(bytes([n]) * 2048) for n in range(6)]
    for now_s, (kind, value) in enumerate(course):
        if kind == "fleet":
            assert isinstance(value, set)
            made.apply(fleet(group(name) for name in sorted(value)))
        elif kind in ("end", "fail"):
            if open_requests:
                assert isinstance(value, int)
                sent = open_requests.pop(value % len(open_requests))
                made.end(sent, now_s, Evidence.STALL if kind == "fail" else None)
        elif kind == "probe":
            for candidate in made.due_probes(now_s):
                made.health.probe_ok(candidate.base_url)
        else:
            assert isinstance(value, int)
            candidate = made.choose(
                "m",
                (),
                b"s-%d" % value if kind == "session" else None,
                prompts[value] if kind == "prompt" else (),
            )
            table = made._tables["m"]
            if candidate is None:
                states = {made.health.state(r.candidate.base_url) for r in table.ranks}
                assert states == {"ejected"}
                continue
            rank = next(r for r in table.ranks if r.candidate is candidate)
            states = {r: made.health.state(r.candidate.base_url) for r in table.ranks}
            healthy = [r for r in table.ranks if states[r] == "healthy"]
            if healthy and states[rank] == "healthy":
                mean = sum(r.in_flight for r in healthy) / len(healthy)
                assert rank.in_flight <= config.balance * mean + config.slack_requests
            if healthy:
                assert states[rank] != "ejected"
            open_requests.append(made.begin(candidate))
        table = made._tables["m"]
        for rank in table.ranks:
            mine = [s for s in open_requests if s.rank is rank]
            assert rank.in_flight == len(mine)
        assert table.in_flight == sum(rank.in_flight for rank in table.ranks)
    for sent in open_requests:
        made.end(sent, 1e6)
    assert all(g.in_flight == 0 for g in made._groups.values())


# Health and external providers, as far as the router joins them


def test_a_dead_rank_is_avoided_at_once_probed_tried_once_and_back() -> None:
    made = router(group("a"), group("b", 1))
    eject(made, "a0", Evidence.REFUSED)
    assert {chosen(made) for _ in range(8)} == {"a1", "b0"}
    assert made.due_probes(0.1) == ()
    (due,) = made.due_probes(0.6)
    assert due.base_url == url("a", 0)
    assert chosen(made) != "a0", "not before its probe is good"
    made.health.probe_ok(due.base_url)
    assert chosen(made) == "a0"
    (trial,) = send(made, a0=1)
    assert "a0" not in {chosen(made) for _ in range(8)}, "one request at a time"
    made.answered(trial, 1.0)
    send(made, a1=2, b0=2)
    assert chosen(made) == "a0", "while the first one still runs"


def test_a_client_that_leaves_during_a_trial_lets_the_next_one_try() -> None:
    made = router(group("a"))
    eject(made, "a0", Evidence.REFUSED)
    made.health.probe_ok(url("a", 0))
    (trial,) = send(made, a0=1)
    assert chosen(made) == "a1"
    made.end(trial, 1.0)
    assert chosen(made) == "a0"


def test_a_stall_ejects_the_whole_group() -> None:
    made = router(group("a"), group("b", 1))
    eject(made, "a0", Evidence.STALL)
    assert {chosen(made) for _ in range(8)} == {"b0"}


def test_when_all_are_ejected_none_is_asked_before_its_probe() -> None:
    made = router(group("a"), group("b", 1))
    (late,) = send(made, a1=1)
    eject(made, "b0", Evidence.SERVER_ERROR, 1.0)
    eject(made, "a0", Evidence.SERVER_ERROR, 2.0)
    assert chosen(made) is None and chosen(made, session=b"s") is None
    made.answered(late, 4.0)
    assert chosen(made) is None, "that was asked before the ejection"
    for candidate in made.due_probes(10.0):
        if candidate.group == "b":
            made.health.probe_ok(candidate.base_url)
    assert {chosen(made) for _ in range(4)} == {"b0"}


def test_without_a_healthy_rank_one_on_trial_is_better_than_one_that_is_ejected() -> None:
    made = router(group("a", 1), group("b", 1))
    eject(made, "a0", Evidence.RESET, 1.0)
    eject(made, "b0", Evidence.RESET, 2.0)
    made.health.probe_ok(url("b", 0))
    send(made, b0=3)
    assert {chosen(made) for _ in range(4)} == {"b0"}, "though its trial is still under way"


def test_requests_that_hang_on_an_ejected_rank_do_not_loosen_the_bound() -> None:
    made = router(group("a", 4))
    send(made, a0=40)
    eject(made, "a0", Evidence.RESET)
    home = chosen(made, session=b"s-1") or ""
    send(made, **{home: 2})
    assert chosen(made, session=b"s-1") != home, "2 > 1.25 * 2 / 3 + 1"


def test_a_request_that_no_group_can_serve_ejects_one_of_them_only() -> None:
    made = router(group("a", 1), group("b", 1), group("c", 1))
    first, second = send(made, a0=1, b0=1)
    made.end(first, 0.0, Evidence.SERVER_ERROR)
    made.end(second, 0.0, Evidence.SERVER_ERROR, retried=True)
    assert {chosen(made) for _ in range(8)} == {"b0", "c0"}
    (refused,) = send(made, b0=1)
    made.end(refused, 0.0, Evidence.REFUSED, retried=True)
    assert {chosen(made) for _ in range(8)} == {"c0"}, "no request is to blame for that"


def test_an_external_provider_is_counted_ejected_and_probed_like_a_rank() -> None:
    made = Router(RoutingConfig())
    made.apply(fleet((), external=(route("east", 1.0), route("west", 2.0))))
    ask = ExternalAsk("chat_completions", 1000, 100, ready=False)
    east = made.choose_external("m", ask).candidate
    assert east is not None and east.external is not None
    assert (east.base_url, east.pool, east.external.model) == ("https://east", "east", "east/m")
    for _ in range(made._config.external.max_in_flight):
        sent = made.begin(east)
    west = made.choose_external("m", ask).candidate
    assert west is not None and west.pool == "west"
    made.end(sent, 0.0)
    assert made.choose_external("m", ask).candidate == east
    made.end(made.begin(east), 0.0, Evidence.SERVER_ERROR)
    assert made.choose_external("m", ask).candidate == west
    assert made.choose_external("m", ask, (Attempt(west, True),)).candidate is None
    assert made.due_probes(0.6) == (east,)
    made.health.probe_ok(east.base_url)
    assert made.choose_external("m", ask).candidate == east
    made.apply(fleet(()))
    assert made.choose_external("m", ask).candidate is None and len(made.health) == 0


def test_external_counts_survive_a_change_of_the_fleet() -> None:
    made = Router(RoutingConfig())
    made.apply(fleet((), external=(route("east"),)))
    (east,) = made.external_candidates("m")
    sent = made.begin(east)
    made.apply(fleet((group("a"),), external=(route("east"),)))
    assert made._providers["east"].in_flight == 1
    made.end(sent, 0.0)
    assert made._providers["east"].in_flight == 0
