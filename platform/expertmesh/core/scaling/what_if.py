"""A recorded decision with something changed, as it is written on a command line: `queue=2x`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.contract import (
    ModelState,
    Observation,
    PoolSeen,
    ScalingConfig,
)
from expertmesh.core.scaling.demand import Flow, GatewaySeen, GroupDoing
from expertmesh.core.scaling.forecast import Forecaster
from expertmesh.core.scaling.kinds import option_name
from expertmesh.core.scaling.peak import Peak
from expertmesh.core.scaling.policy import decide
from expertmesh.core.scaling.replay import DecisionRecord

_COUNT_LIMIT = 10**9

KEYS = {
    "queue": "queued requests: 40 or 2x",
    "load": "all that waits, runs and arrives, now and in what is remembered: 1.5x",
    "arrivals": "requests per second: 12.5 or 2x",
    "price.POOL": "$ per node-hour: 18.40 or 0.5x",
    "price.OPTION": "$ per hour of one group of it",
    "start.OPTION": "seconds that a start takes",
    "nodes.POOL": "nodes that it can have",
    "budget": "$ per hour, or none",
    "budget_per_day": "$ per day, or none",
    "min_groups": "a number",
    "max_groups": "a number",
    "attainment": "share of requests: 0.95",
    "ttft": "seconds",
    "tpot": "seconds",
    "up_delay": "seconds",
    "down_delay": "seconds, or auto",
    "mode": "observe, advise or act",
    "notice.GROUP": "seconds until a node of it is taken away, or none",
    "silent.GATEWAY": "seconds since its last report",
}
"""What can be changed, and how its value is written."""


@dataclass(frozen=True, slots=True)
class _Case:
    config: ScalingConfig
    state: ModelState
    seen: Observation
    now_s: float


def changed(record: DecisionRecord, *settings: str) -> DecisionRecord:
    """Decided again with settings such as `price.h200-spot=0.5x`, applied in their order.

    Raises ValueError, with a text for a person, for a key or value that means nothing here.
    """
    case = _Case(record.config, record.before, record.observation, record.now_s)
    for setting in settings:
        case = _set(case, setting)
    decision = decide(case.config, case.state, case.seen, case.now_s)
    return DecisionRecord(case.now_s, case.config, case.state, case.seen, decision)


def _set(case: _Case, setting: str) -> _Case:
    key, equals, value = setting.partition("=")
    key, value = key.strip(), value.strip()
    word, _, name = key.partition(".")
    if not equals or not value:
        raise ValueError(f"{setting!r}: write KEY=VALUE, e.g. queue=2x")
    try:
        if name and word in _NAMED:
            return _NAMED[word](case, name, value)
        if not name and word in _PLAIN:
            return _PLAIN[word](case, value)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    known = "\n".join(f"  {each:<16} {meaning}" for each, meaning in KEYS.items())
    raise ValueError(f"{key!r} cannot be changed; what can be:\n{known}")


# Values


def _amount(value: str, before: float) -> float:
    """`2x` is twice what it was."""
    times = value.endswith("x")
    try:
        number = float(value[:-1] if times else value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError("write a number that is not negative, or how many times it was, e.g. 2x")
    return number * before if times else number


def _whole(value: str, before: float) -> int:
    number = round(_amount(value, before))
    if number > _COUNT_LIMIT:
        raise ValueError(f"write at most {_COUNT_LIMIT}")
    return number


def _above_zero(value: str, before: float) -> float:
    number = _amount(value, before)
    if number <= 0:
        raise ValueError("write a number above 0")
    return number


def _limit(value: str, before: float | None) -> float | None:
    if value == "none":
        return None
    if before is None and value.endswith("x"):
        raise ValueError("there is none to multiply; write an amount in $")
    return _amount(value, before or 0.0)


def _one_of(name: str, what: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"no such {what}; there is {', '.join(known) or 'none'}")


# Work


def _queue(case: _Case, value: str) -> _Case:
    gateways = case.seen.gateways
    before = sum(max(gateway.queued, gateway.waking) for gateway in gateways)
    after = _whole(value, before)
    if not gateways and after:
        raise ValueError("no gateway has reported that could have a queue")
    return _with_gateways(case, _queues(gateways, after))


def _queues(gateways: tuple[GatewaySeen, ...], after: int) -> tuple[GatewaySeen, ...]:
    """As long together; shared as they were, what is left over by the first."""
    counts = [max(gateway.queued, gateway.waking) for gateway in gateways]
    before = sum(counts)
    shares = [count * after // before if before else 0 for count in counts]
    if shares:
        shares[0] += after - sum(shares)
    return tuple(
        replace(
            gateway,
            queued=share,
            waking=min(gateway.waking, share),
            queued_prompt_tokens=round(gateway.queued_prompt_tokens * share / count)
            if count
            else 0,
            oldest_wait_s=gateway.oldest_wait_s if share else 0.0,
        )
        for gateway, count, share in zip(gateways, counts, shares, strict=True)
    )


def _load(case: _Case, value: str) -> _Case:
    if not value.endswith("x"):
        raise ValueError("write how many times it was, e.g. 1.5x")
    times = _amount(value, 1.0)
    gateways = case.seen.gateways
    queued = sum(max(gateway.queued, gateway.waking) for gateway in gateways)
    gateways = _queues(gateways, min(_COUNT_LIMIT, round(queued * times)))
    case = _with_gateways(
        case, tuple(_times_in_flight(_times_flow(each, times), times) for each in gateways)
    )
    state = case.state
    rise = state.rise
    state = replace(
        _times_arrivals(state, times),
        forecast=_times_forecast(state.forecast, times),
        peak=Peak(tuple((at_s, held * times) for at_s, held in state.peak.falls)),
        rise=replace(rise, load=rise.load * times, held=rise.held * times)
        if rise is not None
        else None,
    )
    groups = tuple(
        replace(group, doing=_times_doing(group.doing, times)) if group.doing else group
        for group in case.seen.groups
    )
    return replace(case, state=state, seen=replace(case.seen, groups=groups))


def _arrivals(case: _Case, value: str) -> _Case:
    before = case.state.work.arrivals_per_s
    after = _amount(value, before)
    if before > 0:
        times = after / before
        gateways = tuple(_times_flow(gateway, times) for gateway in case.seen.gateways)
        state = _times_arrivals(case.state, times)
        return _with_gateways(replace(case, state=state), gateways)
    if value.endswith("x"):
        raise ValueError("none arrive that could be multiplied; write them per second")
    work = replace(case.state.work, arrivals_per_s=after, seldom_arrivals_per_s=after)
    case = replace(case, state=replace(case.state, work=work))
    if not case.seen.gateways:
        raise ValueError("no gateway has reported that could have arrivals")
    first, *rest = case.seen.gateways
    flow = replace(first.flow or Flow(span_s=1.0), arrivals_per_s=after)
    return _with_gateways(case, (replace(first, flow=flow), *rest))


def _with_gateways(case: _Case, gateways: tuple[GatewaySeen, ...]) -> _Case:
    return replace(case, seen=replace(case.seen, gateways=gateways))


def _times_flow(gateway: GatewaySeen, times: float) -> GatewaySeen:
    if gateway.flow is None:
        return gateway
    flow = replace(
        gateway.flow,
        arrivals_per_s=gateway.flow.arrivals_per_s * times,
        arrived_prompt_tokens_per_s=gateway.flow.arrived_prompt_tokens_per_s * times,
    )
    return replace(gateway, flow=flow)


def _times_in_flight(gateway: GatewaySeen, times: float) -> GatewaySeen:
    in_flight = {
        name: min(_COUNT_LIMIT, round(count * times)) for name, count in gateway.in_flight.items()
    }
    return replace(gateway, in_flight=in_flight)


def _times_arrivals(state: ModelState, times: float) -> ModelState:
    work = replace(
        state.work,
        arrivals_per_s=state.work.arrivals_per_s * times,
        seldom_arrivals_per_s=state.work.seldom_arrivals_per_s * times,
    )
    return replace(state, work=work)


def _times_forecast(forecast: Forecaster, times: float) -> Forecaster:
    return replace(
        forecast,
        bins=tuple(load * times for load in forecast.bins),
        filled=forecast.filled * times,
        due=tuple(
            replace(
                due,
                guesses=tuple(guess * times for guess in due.guesses),
                guess=due.guess * times,
            )
            for due in forecast.due
        ),
    )


def _times_doing(doing: GroupDoing, times: float) -> GroupDoing:
    return replace(
        doing,
        running=min(_COUNT_LIMIT, round(doing.running * times)),
        kv_usage=min(1.0, doing.kv_usage * times),
        uncached_prompt_tokens_per_s=doing.uncached_prompt_tokens_per_s * times,
        output_tokens_per_s=doing.output_tokens_per_s * times,
    )


# Supply


def _price(case: _Case, name: str, value: str) -> _Case:
    """Of a pool's nodes, or of a group of one option; running groups are priced anew too."""
    config = case.config
    pools = {pool.name: pool for pool in config.pools}
    options = {option.name: option for option in config.options}
    if name in pools:
        before = pools[name].usd_per_node_hour
        after = _amount(value, before)
        for option in config.options:
            if option.pool == name:
                share = option.workers / pools[name].workers_per_node
                usd = option.usd_per_hour * after / before if before else after * share
                case = _with_price(case, option.name, usd)
        pool = replace(pools[name], usd_per_node_hour=after)
        return _with_pool(case, pool)
    _one_of(name, "pool or option", [*pools, *options])
    return _with_price(case, name, _amount(value, options[name].usd_per_hour))


def _with_price(case: _Case, name: str, usd_per_hour: float) -> _Case:
    options = tuple(
        replace(option, usd_per_hour=usd_per_hour) if option.name == name else option
        for option in case.config.options
    )
    groups = tuple(
        replace(record, spec=replace(record.spec, usd_per_hour=usd_per_hour))
        if option_name(record.spec) == name
        else record
        for record in case.state.groups
    )
    seen = tuple(
        replace(group, spec=replace(group.spec, usd_per_hour=usd_per_hour))
        if group.spec is not None and option_name(group.spec) == name
        else group
        for group in case.seen.groups
    )
    return replace(
        case,
        config=replace(case.config, options=options),
        state=replace(case.state, groups=groups),
        seen=replace(case.seen, groups=seen),
    )


def _with_pool(case: _Case, pool: Pool) -> _Case:
    pools = tuple(pool if each.name == pool.name else each for each in case.config.pools)
    return replace(case, config=replace(case.config, pools=pools))


def _nodes(case: _Case, name: str, value: str) -> _Case:
    pools = {pool.name: pool for pool in case.config.pools}
    _one_of(name, "pool", list(pools))
    pool = pools[name]
    if pool.market is not Market.LOCAL:
        return _with_pool(case, replace(pool, max_nodes=_whole(value, pool.max_nodes)))
    seen = {each.name: each for each in case.seen.pools}
    here = seen.get(name, PoolSeen(name, None, 0))
    before = (here.live_workers or 0) / pool.workers_per_node
    workers = _whole(value, before) * pool.workers_per_node
    seen[name] = replace(here, live_workers=workers)
    return replace(case, seen=replace(case.seen, pools=tuple(seen.values())))


def _start(case: _Case, name: str, value: str) -> _Case:
    options = {option.name: option for option in case.config.options}
    _one_of(name, "option", list(options))
    before = case.state.start_s.get(name, options[name].start_s)
    start_s = {**case.state.start_s, name: _above_zero(value, before)}
    return replace(case, state=replace(case.state, start_s=start_s))


# Rules


def _rule(case: _Case, **rules: object) -> _Case:
    changed_rules = replace(case.config.rules, **rules)  # type: ignore[arg-type]
    if changed_rules.min_groups > changed_rules.max_groups:
        raise ValueError(
            f"min_groups {changed_rules.min_groups} is above max_groups {changed_rules.max_groups}"
        )
    return replace(case, config=replace(case.config, rules=changed_rules))


def _slo(case: _Case, **targets: float) -> _Case:
    slo = replace(case.config.slo, **targets)
    if not 0 < slo.attainment < 1:
        raise ValueError("write a share above 0 and below 1, e.g. 0.95")
    return replace(case, config=replace(case.config, slo=slo))


def _mode(case: _Case, value: str) -> _Case:
    _one_of(value, "mode", [mode.value for mode in ScalingMode])
    return _rule(case, mode=ScalingMode(value))


def _down_delay(case: _Case, value: str) -> _Case:
    if value == "auto":
        return _rule(case, down_delay_s=None)
    return _rule(case, down_delay_s=_amount(value, case.config.rules.down_delay_s or 0.0))


def _notice(case: _Case, name: str, value: str) -> _Case:
    _one_of(name, "group", [group.name for group in case.seen.groups])
    at_s = None if value == "none" else case.now_s + _amount(value, 0.0)
    groups = tuple(
        replace(group, leaving_at_s=at_s) if group.name == name else group
        for group in case.seen.groups
    )
    return replace(case, seen=replace(case.seen, groups=groups))


def _silent(case: _Case, name: str, value: str) -> _Case:
    gateways = case.seen.gateways
    _one_of(name, "gateway", [gateway.gateway for gateway in gateways])
    return _with_gateways(
        case,
        tuple(
            replace(
                gateway,
                heard_at_s=case.now_s - _amount(value, case.now_s - gateway.heard_at_s),
            )
            if gateway.gateway == name
            else gateway
            for gateway in gateways
        ),
    )


_PLAIN: dict[str, Callable[[_Case, str], _Case]] = {
    "queue": _queue,
    "load": _load,
    "arrivals": _arrivals,
    "budget": lambda case, value: _rule(
        case, usd_per_hour_budget=_limit(value, case.config.rules.usd_per_hour_budget)
    ),
    "budget_per_day": lambda case, value: _rule(
        case, usd_per_day_budget=_limit(value, case.config.rules.usd_per_day_budget)
    ),
    "min_groups": lambda case, value: _rule(
        case, min_groups=_whole(value, case.config.rules.min_groups)
    ),
    "max_groups": lambda case, value: _rule(
        case, max_groups=_whole(value, case.config.rules.max_groups)
    ),
    "attainment": lambda case, value: _slo(
        case, attainment=_amount(value, case.config.slo.attainment)
    ),
    "ttft": lambda case, value: _slo(case, ttft_s=_above_zero(value, case.config.slo.ttft_s)),
    "tpot": lambda case, value: _slo(case, tpot_s=_above_zero(value, case.config.slo.tpot_s)),
    "up_delay": lambda case, value: _rule(
        case, up_delay_s=_amount(value, case.config.rules.up_delay_s)
    ),
    "down_delay": _down_delay,
    "mode": _mode,
}
_NAMED: dict[str, Callable[[_Case, str, str], _Case]] = {
    "price": _price,
    "start": _start,
    "nodes": _nodes,
    "notice": _notice,
    "silent": _silent,
}
