"""Skew of a group's experts: assumed or measured, in order or placed."""

from dataclasses import replace

import pytest

from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.balance import (
    DRIFT_PER_DOUBLING,
    IN_ORDER_PER_DOUBLING,
    PLACED_LAYERS,
    Balance,
    Balances,
    ExpertLoad,
    usual_exponent,
)
from expertmesh.core.planner.candidates import Backend, Candidate, Role
from expertmesh.core.planner.plan import Plan
from expertmesh.core.planner.question import Checkpoint, GpuPool, Question, Targets
from expertmesh.core.planner.search import plan_given, search
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators

SOURCE = "deepseek-ai/DeepSeek-V3"
V3 = models()[SOURCE].shape
QWEN = models()["Qwen/Qwen3-235B-A22B-Instruct-2507-FP8"].shape
DENSE = models()["Qwen/Qwen2.5-72B"].shape
EP32 = Layout(1, 32, 32)
COPIES = Layout(1, 32, 32, 32)


def measured(*layer: float, layers: int = 58) -> ExpertLoad:
    return ExpertLoad("a file", (tuple(layer),) * layers)


def of(layout: Layout, load: ExpertLoad | None = None) -> Balance:
    found = Balances(load).of(V3, layout, 8)
    assert found is not None
    return found


def test_without_expert_parallelism_there_is_nothing_to_balance() -> None:
    assert Balances().of(V3, Layout(8), 8) is None
    assert Balances().of(DENSE, Layout(4), 8) is None


def test_copies_and_placement_even_the_usual_load_out() -> None:
    plain, placed = of(EP32), of(COPIES)
    assert plain.before == plain.after < 0.5
    assert placed.before < 0.5 and placed.after > 0.9
    assert plain.skew > 2 > placed.skew
    # Measured over 32 ranks: 1.56 more than the mean, and 1.3 times the mean with EPLB.
    assert plain.skew == pytest.approx(2.56, abs=0.15)
    assert placed.skew == pytest.approx(1.3, abs=0.05)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64, 128])
def test_no_group_is_more_even_than_groups_have_been_seen_to_be(ranks: int) -> None:
    doublings = (ranks - 1).bit_length()
    plain, placed = of(Layout(1, ranks, ranks)), of(Layout(1, ranks, ranks, ranks))
    assert plain.skew >= 1 + IN_ORDER_PER_DOUBLING * doublings
    assert placed.skew >= 1 + DRIFT_PER_DOUBLING * doublings
    assert placed.skew == max(1 + DRIFT_PER_DOUBLING * doublings, 1 / placed.after)
    assert plain.skew >= placed.skew


def test_a_measured_load_takes_the_place_of_the_assumed_one() -> None:
    even = measured(*[1.0] * 256)
    assert of(EP32, even) == Balance(1.0, 1.0, 1 + DRIFT_PER_DOUBLING * 5)
    hot = measured(*[100.0] * 8, *[1.0] * 248)
    assert of(EP32, hot).skew == pytest.approx(800 / (1048 / 32))
    assert of(COPIES, hot).skew < of(EP32, hot).skew / 2


def test_every_layer_of_a_measured_load_may_count() -> None:
    """The sample reaches from the first layer to the last."""
    quiet, hot = (1.0,) * 256, (100.0, *[1.0] * 255)
    ends = ExpertLoad("a file", (hot, *[quiet] * 56, hot))
    assert of(EP32, ends).before < of(EP32, measured(*quiet)).before
    assert len(Balances(ends).loads(V3, PLACED_LAYERS)) == PLACED_LAYERS


def test_qwen3_is_asked_more_unevenly() -> None:
    assert usual_exponent(QWEN) > usual_exponent(V3)


# --- in a plan ---


def pool() -> GpuPool:
    return GpuPool("h200", accelerators()["H200"], 8, 8, 3.0, "on-demand")


def question(load: ExpertLoad | None = None, tpot_s: float = 0.05) -> Question:
    targets = Targets(16384, 2000, 500, ttft_s=5.0, tpot_s=tpot_s)
    return Question((Checkpoint(SOURCE, V3),), targets, expert_load=load)


def test_a_plan_says_how_balanced_its_experts_are_and_what_copies_bring() -> None:
    plan = search(question(), pool())
    assert isinstance(plan, Plan)
    group = plan.serving_group
    assert group.layout.expert_parallel and group.balance is not None
    assert group.balance == Balances().of(V3, group.layout, 8)
    weighed = {option.redundant: option for option in group.copies}
    chosen = weighed[group.layout.redundant_experts]
    assert chosen.rate == pytest.approx(group.tokens_per_s.expected)
    assert chosen.rate >= max(option.rate for option in group.copies) * 0.98
    assert any(option.rate != chosen.rate for option in group.copies)


def test_an_uneven_load_costs_rate_and_an_even_one_spares_copies() -> None:
    even = measured(*[1.0] * 256)
    hot = measured(*[4.0] * 64, *[1.0] * 192)
    chosen = Candidate(Checkpoint(SOURCE, V3), EP32, Role.BOTH, Backend.DEEPEP_LOW_LATENCY)
    rates: list[float] = []
    for load in (even, hot):
        plan = plan_given(question(load, tpot_s=0.5), pool(), chosen)
        assert isinstance(plan, Plan)
        rates.append(plan.tokens_per_s.expected)
    assert rates[0] > rates[1]
    plan = search(question(even), pool())
    assert isinstance(plan, Plan)
    experts = plan.checkpoint.shape.experts
    layout = plan.serving_group.layout
    assert experts is not None
    assert layout.redundant_experts == -experts.count % layout.expert


def test_the_same_load_gives_the_same_plan() -> None:
    load = measured(*[float(n % 7 + 1) for n in range(256)])
    assert search(question(load), pool()) == search(replace(question(load)), pool())
