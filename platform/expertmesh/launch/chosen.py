"""The ways to run groups of each model, in lines for a person."""

from collections.abc import Iterator, Mapping

from expertmesh.core.domain.option import GroupOption
from expertmesh.core.planner.plan import Plan
from expertmesh.spec.group_options import Chosen


def chosen_lines(chosen: Mapping[str, Chosen]) -> Iterator[str]:
    for model, choice in chosen.items():
        ways = len(choice.options)
        yield f"groups of {model}: {ways} option{'s' if ways > 1 else ''} ({choice.why})"
        plans = {(plan.pool.name, plan.serving_group.parallelism): plan for plan in choice.plans}
        for option in choice.options:
            plan = plans.get((option.pool, option.parallelism))
            rest = _figures(plan) if plan else ""
            if option.name in choice.unrated:
                rest = f"; its rates are not known: {choice.unrated[option.name]}"
            yield f"  {option.name}: {_option(option)}{rest}"


def _option(option: GroupOption) -> str:
    sizes, rates = option.parallelism, option.rates
    workers = f"{option.workers} worker{'s' if option.workers > 1 else ''}"
    words = (
        f"expert {sizes.expert}, tensor {sizes.tensor}, data {sizes.data} on {workers}, "
        f"${option.usd_per_hour:.2f} an hour, {rates.in_flight:,.0f} requests at once, "
        f"ready after about {option.start_s:,.0f} s"
    )
    if rates.prefill_tokens_per_s is None or rates.decode_tokens_per_s is None:
        return words
    return (
        f"{words}; alone {rates.prefill_tokens_per_s:,.0f} prompt tokens/s or "
        f"{rates.decode_tokens_per_s:,.0f} of output"
    )


def _figures(plan: Plan) -> str:
    group = plan.serving_group
    tokens, price = group.tokens_per_s, plan.usd_per_mtok
    return (
        f"; both together {tokens.low:,.0f} to {tokens.high:,.0f} of output at "
        f"${price.low:.2f} to ${price.high:.2f} a million, {group.kv_tokens:,} KV tokens; "
        f"{plan.limits}"
    )
