"""What `parallelism: auto` came to, in lines for a person."""

from collections.abc import Iterator, Mapping

from expertmesh.core.planner.plan import Plan
from expertmesh.spec.auto_parallelism import Chosen


def chosen_lines(chosen: Mapping[str, Chosen]) -> Iterator[str]:
    for model, choice in chosen.items():
        sizes = choice.parallelism
        layout = f"expert {sizes.expert}, tensor {sizes.tensor}, data {sizes.data}"
        yield f"plan of {model}: {layout} ({choice.why})"
        for plan in choice.plans:
            yield f"plan of {model} in {plan.pool.name}: {_figures(plan)}"


def _figures(plan: Plan) -> str:
    group = plan.serving_group
    tokens, price = group.tokens_per_s, plan.usd_per_mtok
    return (
        f"{group.gpus} GPUs a group, {group.kv_tokens:,} KV tokens, {group.users:,} users at the "
        f"targets, {tokens.low:,.0f} to {tokens.high:,.0f} tokens/s, ${group.usd_per_hour:.2f} an "
        f"hour, ${price.low:.2f} to ${price.high:.2f} a million tokens of output; {plan.limits}"
    )
