import itertools
import re
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.scaling.market import NOW_S, record, records
from tests.core.scaling.test_policy_properties import bounds, budgets, events, live
from tests.core.scaling.world import World, config, pool

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.scaling.candidates import Candidate, choice_of
from expertmesh.core.scaling.contract import Binding
from expertmesh.core.scaling.counterfactual import Counterfactual, Effect
from expertmesh.core.scaling.explanation import Explanation, explain
from expertmesh.core.scaling.mix import churn_usd, fits, priced
from expertmesh.core.scaling.policy import question_at
from expertmesh.core.scaling.question import Question
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.core.scaling.what_if import changed


def question(of: DecisionRecord) -> Question:
    return question_at(of.config, of.before, of.observation, of.now_s)


def counts(of: Question, candidate: Candidate) -> tuple[int, ...]:
    return tuple(candidate.groups.get(offer.option, 0) for offer in of.problem.offers)


# Counterfactuals


def check_counterfactual(of: DecisionRecord, told: Counterfactual) -> None:
    """In words of its own: what is wanted with the setting, and with the one next to it."""
    before = of.decision.target
    there = {
        offer.option: n
        for offer, n in zip(question(of).problem.offers, question(of).problem.active, strict=True)
    }

    def is_so(setting: str) -> bool:
        after = changed(of, setting).decision.target
        grown = [name for name, n in after.items() if n > there.get(name, 0)]
        if told.effect is Effect.GROWS:
            return bool(grown)
        if told.effect is Effect.RESTS:
            return not grown
        if told.effect is Effect.OTHER:
            return after != before
        assert told.option is not None
        more = after.get(told.option, 0) - before.get(told.option, 0)
        return more > 0 if told.effect is Effect.MORE else more < 0

    assert told.keeps is not None
    assert not is_so(told.keeps), f"{told.keeps} is told to change nothing: {told.text}"
    if told.flips is None:
        return
    assert is_so(told.flips), f"{told.flips} is told to change it: {told.text}"
    assert changed(of, told.flips).decision.target == told.target
    # What moves further may change the whole mix: where it does, only the spot is told.
    if re.search(" or (more|less|fewer)", told.text):
        assert is_so(further(told.flips, told.keeps)), "and so on from there: a bound, not a spot"
    one, other = (
        float(re.sub("[^0-9.]", "", s.partition("=")[2])) for s in (told.flips, told.keeps)
    )
    unit = max(abs(one - other) / max(one, other), 0.0)
    assert unit <= 0.01 or abs(one - other) <= 1.0001, "the two are next to each other"


def further(flips: str, keeps: str) -> str:
    """Away from the setting that changes nothing."""
    key, _, value = flips.partition("=")
    times = "x" if value.endswith("x") else ""
    one, other = (float(each.partition("=")[2].rstrip("x")) for each in (flips, keeps))
    beyond = one / 2 if one < other else one * 2
    whole = key in ("queue", "max_groups", "min_groups") or key.startswith("nodes.")
    return f"{key}={round(beyond)}" if whole else f"{key}={beyond:.6f}{times}"


@settings(max_examples=25, deadline=None)
@given(records())
def test_every_counterfactual_is_true(of: DecisionRecord) -> None:
    for told in explain(of).counterfactuals:
        check_counterfactual(of, told)


@settings(max_examples=10, deadline=None)
@given(st.lists(events, min_size=3, max_size=12), bounds, budgets)
def test_counterfactuals_by_requests_are_true_and_explaining_never_fails(
    course: list[tuple[str, int]], low_high: tuple[int, int], budget: float | None
) -> None:
    world = live(course, *low_high, budget)
    for of in [world.records[0], *world.records[-2:]]:
        told = explain(of, world.records)
        assert told.replays
        assert told.candidates[0].is_chosen
        assert msgspec.json.encode(told)
        for each in told.counterfactuals:
            check_counterfactual(of, each)


def test_the_price_at_which_another_option_is_chosen_is_exact() -> None:
    """Two alike, one at $0.60 and one at $0.90: each wins where it is no dearer than the other."""
    world = World(config(min_groups=1))
    world.step()
    told = {each.option: each for each in explain(world.records[0]).counterfactuals}
    cheap, dear = told["cheap/t1d2e2"], told["dear/t1d2e2"]
    assert cheap.effect is Effect.FEWER
    assert float((cheap.flips or "").partition("=")[2]) == pytest.approx(0.9, abs=2e-4)
    assert dear.effect is Effect.MORE
    assert float((dear.flips or "").partition("=")[2]) == pytest.approx(0.6, abs=2e-4)
    assert dear.target == {"dear/t1d2e2": 1}
    assert dear.text == (
        "with dear/t1d2e2 at $0.6000/h a group (it costs $0.9000) it would have wanted "
        "1 dear/t1d2e2"
    )


def test_a_budget_that_binds_is_told_with_the_one_that_would_not() -> None:
    of = record(groups={0: 1}, arrivals_per_s=20.0, usd_per_hour_budget=30.0)
    told = explain(of)
    assert told.binding is Binding.BUDGET
    assert told.binding_words == "the budget of $30.00/h"
    (budget,) = (each for each in told.counterfactuals if "budget" in each.text)
    assert budget.flips is not None
    assert budget.text.startswith(f"with a budget of ${float(budget.flips[7:]):.2f}/h or more")
    check_counterfactual(of, budget)


# Candidates


def check_reason(of: Question, chosen: Candidate, told: Candidate) -> None:
    """Each part of the reason, by what it says."""
    problem, need = of.problem, of.problem.with_needs()
    mine = priced(problem.offers, need, counts(of, told))
    best = priced(problem.offers, need, choice_of(of).target.mix.counts)
    for part in told.why.split("; "):
        part = part.removeprefix("with what it replaces, until that is gone: ")
        if told.why.startswith("with what it replaces"):
            both = [max(n, a) for n, a in zip(mine.counts, problem.active, strict=True)]
            mine = priced(problem.offers, need, both)
        if found := re.fullmatch(r"misses ([\d.e+-]+) (more )?of the load", part):
            less = mine.short - (best.short if found[2] else 0.0)
            assert less == pytest.approx(float(found[1]), abs=0.051, rel=0.06)
            assert less > 0
        elif found := re.match(r"\+\$([\d.]+)/h(, ([\d.]+)x the need)?", part):
            assert mine.usd_per_hour - best.usd_per_hour == pytest.approx(
                float(found[1]), abs=0.006
            )
            if found[2]:
                assert mine.capacity / need.load == pytest.approx(float(found[3]), abs=0.051)
        elif found := re.fullmatch(r"no room in pool (\S+): (\d+) workers, (\d+) of .*", part):
            used = sum(
                n * offer.workers
                for n, offer in zip(mine.counts, problem.offers, strict=True)
                if offer.pool == found[1]
            )
            assert (used, problem.bounds.workers[found[1]]) == (int(found[2]), int(found[3]))
            assert used > problem.bounds.workers[found[1]]
        elif found := re.match(r"\$([\d.]+)/h is over the budget of \$([\d.]+)/h", part):
            assert problem.bounds.usd_per_hour is not None
            assert problem.bounds.usd_per_hour == pytest.approx(float(found[2]), abs=0.006)
            assert mine.usd_per_hour > problem.bounds.usd_per_hour
        elif found := re.match(r"max_groups is (\d+)", part):
            assert mine.groups > problem.bounds.max_groups == int(found[1])
        elif "min_groups" in part or "a model in use keeps" in part:
            assert mine.groups < problem.bounds.min_groups
        elif part.startswith("spot zone zone-a was lost"):
            assert any(n > offer.kept for n, offer in zip(mine.counts, problem.offers, strict=True))
        elif part.startswith("its starts cost"):
            starts = [
                sum(
                    max(0, n - offer.kept) * offer.start_usd
                    for n, offer in zip(mix.counts, problem.offers, strict=True)
                )
                for mix in (mine, best)
            ]
            assert starts[0] > starts[1]
        elif "lost with a spot zone" in part:
            assert mine.uncovered > best.uncovered or mine.uncovered == pytest.approx(
                best.uncovered
            )
            assert mine.uncovered > 0
        elif part == "the risk of losing its zone outweighs its price":
            assert mine.usd_per_hour <= best.usd_per_hour + 1e-9
        elif part.startswith("costs the same within 1 %"):
            assert mine.usd <= best.usd
        elif part.startswith("saves too little to replace"):
            assert best.counts == problem.active
            assert mine.usd > 0.95 * best.usd - 1e-9
        elif part.startswith("a provider"):
            assert problem.external_usd is not None
            assert problem.held_load * problem.external_usd < mine.usd
        elif found := re.fullmatch(r"saves ([\d.]+)%: too little to look for", part):
            assert float(found[1]) <= 0.5
        elif part.startswith("the cheapest cannot be had from what there is"):
            both = [max(n, a) for n, a in zip(mine.counts, problem.active, strict=True)]
            assert fits(problem.offers, problem.bounds, both)
        else:
            raise AssertionError(f"a reason that nobody checks: {part}")


@settings(max_examples=150, deadline=None)
@given(records())
def test_every_candidate_lost_for_the_reason_that_is_told(of: DecisionRecord) -> None:
    asked = question(of)
    told = choice_of(asked).candidates
    chosen, *others = told
    assert {name: n for name, n in of.decision.target.items() if n} == chosen.groups
    seen = set()
    for each in others:
        assert each.why
        assert not each.is_chosen
        if each.name == "provider":
            assert asked.problem.external_usd is not None
            continue
        mine = counts(asked, each)
        assert mine not in seen, "each once"
        seen.add(mine)
        again = priced(asked.problem.offers, asked.problem.with_needs(), mine)
        assert again.usd == pytest.approx(each.usd)
        assert again.usd_per_hour == pytest.approx(each.usd_per_hour)
        check_reason(asked, chosen, each)


@settings(max_examples=60, deadline=None)
@given(records())
def test_no_small_mix_that_could_be_had_is_much_cheaper_than_the_candidates(
    of: DecisionRecord,
) -> None:
    """The candidates are the best of their kind, not any."""
    asked = question(of)
    offers, need, limits = asked.problem.offers, asked.problem.with_needs(), asked.problem.bounds
    told = {each.name: each for each in choice_of(asked).candidates if each.groups}
    for index, offer in enumerate(offers):
        each = told.get(f"no {offer.option}")
        if each is None or each.is_barred:
            continue
        for mix in itertools.product(range(3), repeat=len(offers)):
            if mix[index] == 0 and fits(offers, limits, mix):
                usd = priced(offers, need, mix).usd + churn_usd(offers, mix)
                mine = each.usd + churn_usd(offers, counts(asked, each))
                assert usd >= mine * 0.99 - 1e-6


def by_name(told: Explanation) -> dict[str, Candidate]:
    return {each.name: each for each in told.candidates}


def test_a_lost_zone_a_full_pool_and_a_provider_are_told() -> None:
    of = record(groups={0: 1}, arrivals_per_s=20.0, lost_ago_s=300.0, nodes=1)
    told = by_name(explain(of, with_counterfactuals=False))
    assert told["+1 h200-spot/t1d8e8"].why.startswith("spot zone zone-a was lost")
    assert told["+1 h200-spot/t1d8e8"].is_barred
    assert "no room in pool h200-od: 16 workers, 8 of them can be had" in {
        part for each in told.values() for part in each.why.split("; ")
    }
    outside = record(arrivals_per_s=20.0, external_usd_per_mtok=0.001)
    told_outside = explain(outside, with_counterfactuals=False)
    assert told_outside.binding is Binding.EXTERNAL
    assert told_outside.candidates[0].name == "provider"
    dear = explain(record(arrivals_per_s=20.0, external_usd_per_mtok=50.0))
    assert by_name(dear)["provider"].why.startswith("+$")


# Inputs, modes, what happened


def test_inputs_have_their_age_and_what_is_too_old_is_marked() -> None:
    of = record(groups={0: 1, 2: 1}, lost_ago_s=300.0)
    gateway = replace(of.observation.gateways[0], heard_at_s=NOW_S - 12.0)
    of = replace(of, observation=replace(of.observation, gateways=(gateway,)))
    told = {each.source: each for each in explain(changed(of)).inputs}
    assert told["gateway g1"].age_s == pytest.approx(12.0)
    assert not told["gateway g1"].is_believed
    assert told["group em-moe-h200-od-1"].age_s == pytest.approx(0.7)
    assert "20 running" in told["group em-moe-h200-od-1"].says
    assert told["zone zone-a"].age_s == pytest.approx(300.0)
    assert told["pool h200-od"].age_s is None


def test_advice_is_told_and_nothing_is_done() -> None:
    told = explain(record(arrivals_per_s=20.0, mode=ScalingMode.ADVISE))
    assert told.actions == ()
    assert [action.kind for action in told.advice] == ["start"] * len(told.advice)
    assert told.advice
    assert told.binding_words == "mode advise: the groups are left as they are"
    assert any(each.effect is Effect.RESTS for each in told.counterfactuals)


def test_what_happened_is_read_off_the_later_records() -> None:
    world = World(config(pool("cheap", 0.3), up_delay_s=0.0), start_s=20)
    world.step(queued=3)
    world.steps(90, queued=3)
    told = explain(world.records[0], world.records)
    (start,) = told.expected.starts
    assert (start.option, start.ready_in_s) == ("cheap/t1d2e2", 60.0)
    assert told.happened is not None
    (seen,) = told.happened.starts
    assert (seen.fate, seen.ready_in_s) == ("ready", 20.0)
    assert explain(world.records[-1], world.records).happened is None


def test_a_start_that_failed_is_told() -> None:
    world = World(config(pool("cheap", 0.3), up_delay_s=0.0), start_s=20)
    world.failing_pools = {"cheap"}
    world.steps(60, queued=3)
    told = explain(world.records[0], world.records).happened
    assert told is not None
    assert [(start.fate, start.ready_in_s) for start in told.starts] == [("failed", None)]


def test_a_record_of_another_policy_is_found_out() -> None:
    of = record(groups={0: 1}, arrivals_per_s=20.0)
    assert explain(of).replays
    other = replace(of, decision=replace(of.decision, need=7))
    assert not explain(other, with_counterfactuals=False).replays
