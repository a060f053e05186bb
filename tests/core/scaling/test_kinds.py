from dataclasses import replace

import pytest
from tests.core.scaling.world import Traffic, World, pool, size_option, token_config

from expertmesh.core.domain.fleet import GroupSpec, Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.contract import ModelState, ScalingConfig
from expertmesh.core.scaling.kinds import Kinds, kind_of, kinds_of, miss_usd_per_hour, offer
from expertmesh.core.scaling.learning import Learned
from expertmesh.core.scaling.work import Work

POOL = pool("p", 0.5, nodes=40)
SPOT = replace(pool("s", 0.2, nodes=40, market=Market.SPOT), zone="z1")
KNOWN = Work(
    finished_per_s=5.0, prompt_tokens_per_s=500.0, output_tokens_per_s=1280.0, finished=1e3
)
SMALL, LARGE = size_option(POOL, 1), size_option(POOL, 2)


def kinds(config: ScalingConfig, state: ModelState | None = None, work: Work = KNOWN) -> Kinds:
    return kinds_of(config, state or ModelState(), work, [])


def test_capacity_is_by_tokens_once_the_work_is_known() -> None:
    both = kinds(token_config(SMALL, LARGE, pools=(POOL,)))
    assert both.by_tokens
    assert both.unit is both.all[0]
    assert [both.capacity(kind) for kind in both.all] == [1.0, pytest.approx(2.0)]
    assert both.named(LARGE.name).option == LARGE


def test_before_that_it_is_by_requests_at_once() -> None:
    half = replace(LARGE, rates=GroupRates(128.0, 1e6, 1e4, 0.02))
    unknown = kinds(token_config(SMALL, half, pools=(POOL,)), work=Work())
    assert not unknown.by_tokens
    assert unknown.capacity(unknown.all[1]) == 0.5


def test_what_was_learned_of_one_slows_all_but_what_is_its_own() -> None:
    learned = {SMALL.name: Learned(2.0, 1.0, None, None, 600.0)}
    slow = kinds(token_config(SMALL, LARGE, pools=(POOL,)), ModelState(learned=learned))
    fast = kinds(token_config(SMALL, LARGE, pools=(POOL,)))
    for mine, planned in zip(slow.all, fast.all, strict=True):
        assert mine.seconds is not None
        assert planned.seconds is not None
        assert mine.seconds == pytest.approx(2 * planned.seconds)
        assert mine.ratio == pytest.approx(2.0)
    own = {SMALL.name: Learned(2.0, 2.0, None, None, 600.0)}
    one = kinds(token_config(SMALL, LARGE, pools=(POOL,)), ModelState(learned=own))
    assert one.capacity(one.all[1]) == pytest.approx(4.0)


def test_an_option_of_which_nothing_is_known_does_as_much_for_each_worker() -> None:
    unplanned = size_option(POOL, 2, known=False)
    both = kinds(token_config(SMALL, unplanned, pools=(POOL,)))
    assert both.by_tokens
    assert both.capacity(both.all[1]) == pytest.approx(2.0)


@pytest.mark.parametrize(("measured_s", "believed"), [(10.0, False), (600.0, True)])
def test_where_nothing_is_planned_measured_seconds_count_after_a_while(
    measured_s: float, believed: bool
) -> None:
    unplanned = size_option(POOL, 1, known=False)
    state = ModelState(learned={unplanned.name: Learned(seconds=0.3, measured_s=measured_s)})
    one = kinds(token_config(unplanned, pools=(POOL,)), state)
    assert one.by_tokens is believed
    assert one.all[0].seconds == (0.3 if believed else None)


def test_a_group_of_a_kind_that_is_not_offered_any_more_is_still_one() -> None:
    spec = GroupSpec("em-m-p-1", "tiny", "/m", "gone", Parallelism(1, 4, 4), 1024, 3.0)
    known = token_config(SMALL, pools=(POOL,))
    found = kinds_of(known, ModelState(), KNOWN, [spec])
    foreign = found.named(kind_of(known, spec))
    assert not foreign.is_offered
    assert foreign.pool is None
    assert foreign.zone is None
    assert found.capacity(foreign) == pytest.approx(2.0)
    assert offer(found, foreign, 1, 0.0, 0.0, may_start=True).limit == 1
    assert found.named(SMALL.name).is_offered


def test_measured_starts_count_more_than_planned_ones() -> None:
    found = kinds(token_config(SMALL, pools=(POOL,)), ModelState(start_s={SMALL.name: 333.0}))
    assert found.all[0].start_s == 333.0


@pytest.mark.parametrize(("start_s", "horizon_s"), [(10.0, 600.0), (400.0, 1200.0), (9e3, 3600.0)])
def test_a_choice_is_judged_over_some_starts(start_s: float, horizon_s: float) -> None:
    found = kinds(token_config(size_option(POOL, start_s=start_s), pools=(POOL,)))
    assert found.horizon_s == horizon_s


def test_spot_nodes_without_a_zone_are_a_zone_of_their_own() -> None:
    alone = replace(SPOT, zone=None)
    config = token_config(size_option(POOL), size_option(SPOT), pools=(POOL, SPOT))
    assert [kind.zone for kind in kinds(config).all] == [None, "z1"]
    config = token_config(size_option(alone), pools=(alone,))
    assert kinds(config).all[0].zone == "s"


def test_an_offers_price_is_that_of_the_horizon_and_of_its_risk() -> None:
    config = token_config(size_option(POOL), size_option(SPOT), pools=(POOL, SPOT))
    found = kinds(config)
    plain = offer(found, found.all[0], 2, 1.0, 0.0, may_start=True)
    assert (plain.kept, plain.limit, plain.workers, plain.pool) == (2, None, 2, "p")
    assert plain.usd == pytest.approx(1.0 * 600 / 3600)
    assert plain.start_usd == pytest.approx(1.0 * 60 / 3600)
    safe = offer(found, found.all[1], 0, 0.0, 0.0, may_start=True)
    risky = offer(found, found.all[1], 0, 2.0, 0.0, may_start=True)
    assert safe.usd == pytest.approx(0.4 * 600 / 3600)
    assert risky.usd - safe.usd == pytest.approx(2.0 * 600 / 3600 * 1.0 * 60 / 3600)
    assert risky.usd_per_hour == safe.usd_per_hour == 0.4


def test_a_kind_that_may_not_start_is_limited_to_what_is_there() -> None:
    found = kinds(token_config(SMALL, pools=(POOL,)))
    assert offer(found, found.all[0], 2, 0.0, 0.0, may_start=False).limit == 2


def test_waiting_for_groups_that_are_missing_makes_slow_starts_dearer() -> None:
    found = kinds(token_config(SMALL, pools=(POOL,)))
    calm = offer(found, found.all[0], 0, 0.0, 0.0, may_start=True)
    late = offer(found, found.all[0], 0, 0.0, 99.0, may_start=True)
    assert late.start_usd - calm.start_usd == pytest.approx(99.0 * 60 / 3600)


def test_a_group_that_costs_nothing_is_still_one_too_many() -> None:
    free = pool("free", 0.0, nodes=40)
    found = kinds(token_config(size_option(free), pools=(free,)))
    assert offer(found, found.all[0], 0, 0.0, 0.0, may_start=True).usd > 0
    assert found.unit_usd_per_hour == 1.0


def test_missing_capacity_is_priced_by_the_share_of_requests_that_may_miss() -> None:
    config = token_config(size_option(SPOT), size_option(POOL), pools=(SPOT, POOL))
    found = kinds(config)
    assert found.unit_usd_per_hour == 1.0
    assert miss_usd_per_hour(found, Slo(attainment=0.9)) == pytest.approx(9.0)
    assert miss_usd_per_hour(found, Slo(attainment=0.99)) == pytest.approx(99.0)
    assert miss_usd_per_hour(found, Slo(attainment=1.0)) == pytest.approx(999.0)


def test_a_model_without_options_has_no_kinds() -> None:
    none = kinds(replace(token_config(SMALL, pools=(POOL,)), options=()))
    assert none.all == ()
    assert none.unit is None
    assert not none.by_tokens
    world = World(replace(token_config(SMALL, pools=(POOL,), min_groups=1), options=()))
    world.traffic = Traffic(5.0)
    assert world.step().pending == "pending: the model has no pool"
