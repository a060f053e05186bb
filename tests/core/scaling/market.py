"""Decisions about a model that has many options, drawn one by one: by tokens, prices and zones."""

from dataclasses import replace

from hypothesis import strategies as st
from tests.core.scaling.world import rules

from expertmesh.core.domain.fleet import ExternalRoute, GroupSpec, GroupState, Parallelism, Rank
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.contract import (
    ApplicationSeen,
    GroupRecord,
    GroupSeen,
    ModelState,
    Observation,
    PoolSeen,
    RankSeen,
    ReplicaSeen,
    ScalingConfig,
)
from expertmesh.core.scaling.demand import Flow, GatewaySeen, GroupDoing
from expertmesh.core.scaling.forecast import Forecaster
from expertmesh.core.scaling.policy import decide
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.core.scaling.spot import Zone
from expertmesh.core.scaling.work import Work

NOW_S = 1_000_000.0
_PROMPT, _OUTPUT = 1000.0, 300.0
_POOLS = {
    "h200-od": (Market.ON_DEMAND, 27.12, None, 600.0),
    "h200-spot": (Market.SPOT, 9.52, "zone-a", 600.0),
    "h100-od": (Market.ON_DEMAND, 18.32, None, 420.0),
}


def options(prices: dict[str, float]) -> tuple[GroupOption, ...]:
    found = []
    for name, (_, _, _, start_s) in _POOLS.items():
        speed = 0.55 if name.startswith("h100") else 1.0
        for ranks in (8, 16):
            size = ranks / 8 * 1.15 if ranks > 8 else 1.0
            rates = GroupRates(
                in_flight=256 * size * speed,
                prefill_tokens_per_s=60_000 * size * speed,
                decode_tokens_per_s=9_000 * size * speed,
                lone_tpot_s=0.012,
            )
            found.append(
                GroupOption(
                    pool=name,
                    parallelism=Parallelism(tensor=1, data=ranks, expert=ranks),
                    usd_per_hour=prices[name] * ranks / 8,
                    rates=rates,
                    start_s=start_s + 10 * ranks,
                )
            )
    return tuple(found)


def record(
    *,
    groups: dict[int, int] | None = None,
    arrivals_per_s: float = 30.0,
    queued: int = 0,
    prices: dict[str, float] | None = None,
    nodes: int = 6,
    lost_ago_s: float | None = None,
    external_usd_per_mtok: float | None = None,
    attainment: float = 0.99,
    **changes: object,
) -> DecisionRecord:
    """`groups`: ready ones by the index of their option."""
    prices = {name: usd for name, (_, usd, _, _) in _POOLS.items()} | (prices or {})
    pools = tuple(
        Pool(name, market, prices[name], "GPU", 8, 96, 0, nodes, zone)
        for name, (market, _, zone, _) in _POOLS.items()
    )
    external: tuple[ExternalRoute, ...] = ()
    if external_usd_per_mtok is not None:
        usd = external_usd_per_mtok
        external = (ExternalRoute("api", "https://api", "m", "KEY", usd, usd, usd),)
    config = ScalingConfig(
        model="moe",
        source="org/moe",
        max_model_len=65_536,
        rules=replace(rules(up_delay_s=0.0, down_delay_s=None, max_groups=8), **changes),  # type: ignore[arg-type]
        pools=pools,
        options=options(prices),
        slo=Slo(attainment=attainment),
        external=external,
    )
    running = [
        group
        for index, count in (groups or {}).items()
        for group in _running(config.options[index], index, count)
    ]
    work = Work(
        arrivals_per_s=arrivals_per_s,
        seldom_arrivals_per_s=arrivals_per_s,
        done_per_s=arrivals_per_s,
        finished_per_s=30.0,
        prompt_tokens_per_s=30.0 * _PROMPT,
        output_tokens_per_s=30.0 * _OUTPUT,
        finished=9_000.0,
        for_s=7200.0,
    )
    unit_s = config.options[0].rates.seconds(_PROMPT, _OUTPUT) or 0.0
    state = ModelState(
        wanted=len(running),
        next_n=100,
        groups=tuple(running),
        seen_at_s=NOW_S - 1.0,
        work=work,
        forecast=Forecaster(bins=(arrivals_per_s * unit_s,) * 17, bin_number=100),
        zones={"zone-a": Zone(NOW_S - 90_000.0)},
    )
    if lost_ago_s is not None:
        state = replace(state, zones={"zone-a": Zone(NOW_S - 90_000.0).lost(NOW_S - lost_ago_s)})
    flow = Flow(1.0, arrivals_per_s, arrivals_per_s * _PROMPT, 30.0, 30e3, 9e3)
    in_flight = {each.spec.name: 20 for each in running}
    observation = Observation(
        groups=tuple(_seen(each, arrivals_per_s / max(1, len(running))) for each in running),
        pools=tuple(PoolSeen(pool.name, 0, 0) for pool in pools),
        gateways=(
            GatewaySeen(
                "g1", NOW_S - 0.5, NOW_S - 1, queued, queued * 1000, 0, 0.5, flow, in_flight
            ),
        ),
    )
    decision = decide(config, state, observation, NOW_S)
    return DecisionRecord(NOW_S, config, state, observation, decision)


def _running(option: GroupOption, index: int, count: int) -> list[GroupRecord]:
    found = []
    for n in range(count):
        name = f"em-moe-{option.pool}-{10 * index + n + 1}"
        spec = GroupSpec(
            name, "moe", "org/moe", option.pool, option.parallelism, 65_536, option.usd_per_hour
        )
        ranks = tuple(
            Rank(each, f"http://10.0.{index}.{n}:{8000 + each}/{name}")
            for each in range(option.parallelism.data)
        )
        found.append(
            GroupRecord(
                spec=spec,
                state=GroupState.READY,
                since_s=NOW_S - 20_000.0,
                requested_at_s=NOW_S - 20_700.0 - n,
                ranks=ranks,
                members=tuple(f"node-{index}-{n}/{each}" for each in range(len(ranks))),
                served=True,
            )
        )
    return found


def _seen(group: GroupRecord, arrivals_per_s: float) -> GroupSeen:
    replicas = tuple(ReplicaSeen("RUNNING", member, True) for member in group.members)
    ranks = tuple(RankSeen(rank.base_url, 0, rank.index, len(group.ranks)) for rank in group.ranks)
    doing = GroupDoing(
        at_s=NOW_S - 0.7,
        span_s=10.0,
        running=20,
        waiting=0,
        kv_usage=0.1,
        uncached_prompt_tokens_per_s=arrivals_per_s * _PROMPT,
        output_tokens_per_s=arrivals_per_s * _OUTPUT,
        tpot_s=0.02,
    )
    return GroupSeen(
        group.spec.name, ApplicationSeen("RUNNING", "", replicas), ranks, True, doing=doing
    )


@st.composite
def records(draw: st.DrawFn) -> DecisionRecord:
    low = draw(st.integers(0, 2))
    return record(
        groups=draw(st.dictionaries(st.integers(0, 5), st.integers(1, 2), max_size=3)),
        arrivals_per_s=draw(st.floats(0.0, 90.0)),
        queued=draw(st.sampled_from([0, 0, 1, 80, 900])),
        prices={name: draw(st.floats(4.0, 60.0)) for name in _POOLS},
        nodes=draw(st.sampled_from([0, 1, 3, 6, 6, 6, 6])),
        lost_ago_s=draw(st.sampled_from([None, None, 300.0, 5000.0])),
        external_usd_per_mtok=draw(st.sampled_from([None, None, 0.05, 2.0])),
        attainment=draw(st.sampled_from([0.9, 0.99])),
        min_groups=low,
        max_groups=low + draw(st.integers(1, 5)),
        usd_per_hour_budget=draw(st.sampled_from([None, None, 30.0, 80.0])),
    )
