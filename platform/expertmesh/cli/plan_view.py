"""Plans as a table for a person and as JSON for a program."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.efficiency import Range
from expertmesh.core.planner.engine_arguments import (
    chart_values,
    engine_settings,
    vllm_serve_arguments,
)
from expertmesh.core.planner.plan import GroupPlan, NoPlan, Plan
from expertmesh.core.planner.question import GpuPool, Targets
from expertmesh.spec.planning import OWN_PRICE

if TYPE_CHECKING:
    from expertmesh.cli.plan import Answer

_GIB = 2**30
_HEADERS = (
    ("pool", "left"), ("fits", "left"), ("groups", "left"), ("GPUs", "right"),
    ("KV tokens", "right"), ("users", "right"), ("tokens/s", "right"), ("$/h", "right"),
    ("$/Mtok out", "right"), ("Wh/Mtok", "right"), ("limited by", "left"),
)  # fmt: skip

_LEFT_OUT_FIRST = ("Wh/Mtok", "KV tokens", "GPUs", "limited by")
_STYLES = {"yes": "green", "no": "red"}
_FOLDED = ("pool", "limited by")
"""On a narrow terminal; figures stay whole."""


def render(
    answers: Sequence["Answer"], *, width: int, details: bool, explain: bool
) -> RenderableType:
    parts: list[RenderableType] = []
    subjects = list(dict.fromkeys(id(answer.subject) for answer in answers))
    for subject in subjects:
        own = [answer for answer in answers if id(answer.subject) == subject]
        parts.append(_table(own, width))
        parts += [Text(f"  {w}", style="yellow") for w in own[0].subject.warnings]
        parts.append(_prices(own))
        for answer in own:
            if isinstance(answer.plan, NoPlan):
                parts.append(_refusal(answer.plan))
        best = _best([answer.plan for answer in own if isinstance(answer.plan, Plan)])
        if best is not None and details:
            parts.append(_detail(best, own[0].subject.kv))
            options = [plan for answer in own if answer.plan is best for plan in answer.options]
            parts.append(_options(options))
        if explain:
            parts += [_explained(answer.plan, answer.seconds) for answer in own]
    return Group(*parts)


def _best(plans: Sequence[Plan]) -> Plan | None:
    """Of the pools that can: the cheapest token, or where GPUs have no price the fewest GPUs."""
    priced = [plan for plan in plans if plan.usd_per_hour > 0] or plans
    return min(priced, key=lambda plan: (plan.usd_per_mtok.expected, plan.gpus), default=None)


def _table(answers: Sequence["Answer"], width: int) -> Table:
    subject = answers[0].subject
    best = _best([answer.plan for answer in answers if isinstance(answer.plan, Plan)])
    rows = [_cells(answer.plan) for answer in answers]
    shown = _columns(rows, width)
    table = Table(
        title=f"{escape(subject.name)}   {_targets(subject.targets)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index in shown:
        header, justify = _HEADERS[index]
        table.add_column(
            header,
            justify="left" if justify == "left" else "right",
            overflow="fold",
            no_wrap=header not in _FOLDED,
        )
    for answer, row in zip(answers, rows, strict=True):
        cells = [Text(row[index], style=_STYLES.get(row[index], "")) for index in shown]
        table.add_row(*cells, style="bold" if answer.plan is best and len(answers) > 1 else "")
    return table


def _columns(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Those that a narrow terminal has room for; all are in the JSON."""
    shown = list(range(len(_HEADERS)))

    def needed(index: int) -> int:
        lines = [_HEADERS[index][0], *(line for row in rows for line in row[index].splitlines())]
        return max(len(line) for line in lines) + 1

    for header in _LEFT_OUT_FIRST:
        if sum(needed(index) for index in shown) + 1 <= width:
            break
        shown.remove(next(i for i in shown if _HEADERS[i][0] == header))
    return shown


def _targets(targets: Targets) -> str:
    users = "" if targets.users is None else f", {targets.users:,} users"
    return (
        f"{targets.input_tokens:,} in + {targets.output_tokens:,} out, context "
        f"{targets.context_tokens:,}, TTFT {targets.ttft_s:g} s, TPOT {targets.tpot_s * 1000:g} ms"
        f"{users}"
    )


def _cells(plan: Plan | NoPlan) -> tuple[str, ...]:
    """As in `_HEADERS`."""
    if isinstance(plan, NoPlan):
        empty = ("",) * (len(_HEADERS) - 3)
        return (plan.pool.name, "no", *empty, plan.constraint.value)
    priced = plan.pool.usd_per_gpu_hour > 0
    group = plan.serving_group
    return (
        plan.pool.name,
        "yes",
        _groups(plan),
        str(plan.gpus),
        _short(group.kv_tokens * group.count),
        f"{plan.users:,}",
        _range(plan.tokens_per_s, _short),
        f"{plan.usd_per_hour:,.2f}" if priced else "?",
        _range(plan.usd_per_mtok, _money) if priced else "?",
        f"{plan.energy.wh_per_mtok:,.0f}" if plan.energy else "?",
        f"{group.limit}, {group.time_limit}",
    )


def _groups(plan: Plan) -> str:
    """Groups apart take a line each."""
    return "\n".join(
        (f"{group.count} x " if group.count > 1 else "") + _layout(group) for group in plan.groups
    )


def _layout(group: GroupPlan) -> str:
    layout = group.layout
    parts = [f"TP{layout.tensor}", f"DP{layout.data}" if layout.data > 1 else ""]
    if layout.expert_parallel:
        parts.append(f"EP{layout.expert}")
    if layout.redundant_experts:
        parts.append(f"+{layout.redundant_experts}")
    if group.role != "both":
        parts.append(group.role.value)
    return " ".join(part for part in parts if part)


def _prices(answers: Sequence["Answer"]) -> Table:
    pools = {answer.plan.pool.name: answer.plan.pool for answer in answers}
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for pool in pools.values():
        if pool.price_note != OWN_PRICE:
            style = "yellow" if "STALE" in pool.price_note else ""
            grid.add_row(Text(f"  price {pool.name}"), Text(_price(pool), style=style))
    return grid


def _price(pool: GpuPool) -> str:
    if pool.usd_per_gpu_hour <= 0:
        return f"({pool.price_note})"
    return f"{pool.usd_per_gpu_hour:.2f} $/GPU-h {pool.market} ({pool.price_note})"


def _refusal(plan: NoPlan) -> Text:
    text = Text(f"  {plan.pool.name}: {plan.problem}", style="red")
    for nearest in plan.nearest:
        text.append(f"\n      nearest: {nearest}", style="not red")
    return text


def _detail(plan: Plan, kv: Dtype) -> RenderableType:
    group = plan.serving_group
    settings = engine_settings(group, plan.pool, kv)
    tokens, price = plan.tokens_per_s, plan.usd_per_mtok
    rows = [
        ("why", plan.why),
        ("a group", f"{_layout(group)} on {group.nodes} node{'s' if group.nodes > 1 else ''}"),
        (
            "users",
            f"{group.users:,} at the targets ({group.batch_per_rank} a rank); at most "
            f"{group.max_concurrency:,} of the whole context by memory",
        ),
        (
            "latency",
            f"TPOT {_ms(group.tpot_s)} on average"
            + (
                f", TTFT {_ms(plan.groups[0].ttft_s)} for {plan.targets.attainment:.4g} of requests"
                if plan.groups[0].ttft_s.expected
                else ""
            ),
        ),
        (
            "expected",
            f"{_short(tokens.expected)} tokens/s at {_money(price.expected)} $/Mtok; the table "
            "shows the range of four in five published measurements",
        ),
        ("limit", plan.limits),
        ("failures", str(plan.availability)),
        ("engine", ", ".join(f"{k}: {_plain(v)}" for k, v in settings.engine.items())),
    ]
    if settings.environment:
        rows.append(("env", " ".join(f"{k}={v}" for k, v in settings.environment.items())))
    rows += [("note", note) for note in (*plan.notes, *settings.notes)]
    title = Text(f"\n  {plan.pool.name}: {plan.checkpoint.source}", style="bold")
    return Group(title, _named_lines(rows))


def _options(options: Sequence[Plan]) -> Table:
    """Of the pool above, as the controller gets them; with `auto` the best first."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 2))
    headers = ("option", "GPUs", "$/h", "requests", "reads/s", "writes/s", "starts in s", "why")
    for header in headers:
        left = header in ("option", "why")
        table.add_column(header, justify="left" if left else "right", overflow="fold")
    for plan in options:
        group = plan.serving_group
        alone = (group.rates.prefill_tokens_per_s or 0.0, group.rates.decode_tokens_per_s or 0.0)
        table.add_row(
            _layout(group),
            str(group.gpus),
            _money(group.usd_per_hour),
            f"{group.users:,}",
            *map(_short, alone),
            f"{group.start_s:.0f}",
            plan.why if plan is not options[0] else "",
        )
    return table


def _named_lines(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, line in rows:
        grid.add_row(f"    {name}", Text(line))
    return grid


def _explained(plan: Plan | NoPlan, seconds: float) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"\n  {plan.pool.name}: {plan.considered} candidates in {seconds:.2f} s", style="bold")
    ]
    if isinstance(plan, Plan):
        parts.append(_named_lines([("memory", _memory(group)) for group in plan.groups]))
        balanced = [line for group in plan.groups for line in _balance(group)]
        parts.append(_named_lines(balanced))
        if plan.runners_up:
            parts.append(_runners_up(plan))
    losers = [
        (
            loser.constraint.value,
            f"{loser.candidate}: {loser.problem}"
            + (f"; nearest: {loser.possible}" if loser.possible else ""),
        )
        for loser in plan.ruled_out
    ]
    parts.append(_named_lines(losers))
    return Group(*parts)


def _balance(group: GroupPlan) -> list[tuple[str, str]]:
    balance = group.balance
    if balance is None:
        return []
    copies = group.layout.redundant_experts
    placed = f"{balance.after:.2f} as EPLB places them with {copies} copies"
    lines = [
        (
            "experts",
            f"balancedness {balance.before:.2f} in order"
            + (f", {placed}" if copies else ", and nothing moves them: there are no copies")
            + f"; planned for a busiest GPU with {balance.skew:.2f} times the mean",
        )
    ]
    for option in group.copies:
        fits = f"{_short(option.rate)} tokens/s" if option.rate else "does not fit or meet targets"
        gain = f", {option.gain_per_slot:+.1%} a slot" if option.gain_per_slot else ""
        chosen = "  <- chosen" if option.redundant == copies else ""
        lines.append(
            (
                f"+{option.redundant}",
                f"{option.bytes_per_rank / _GIB:.1f} GiB a GPU, balancedness "
                f"{option.balancedness:.2f}, {fits}{gain}{chosen}",
            )
        )
    return lines


def _memory(group: GroupPlan) -> str:
    memory = group.memory
    held = memory.weights
    parts = {
        "experts": held.experts,
        "attention": held.attention,
        "dense": held.dense,
        "shared": held.shared,
        "embeddings": held.embeddings,
        "other": held.other,
        "activations": memory.activation_bytes,
        "buffers": memory.buffer_bytes,
        "graphs": memory.graph_bytes,
        "headroom": memory.headroom_bytes,
        "KV cache": memory.kv_bytes,
    }
    shown = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items() if size)
    return f"GiB of a GPU with {memory.memory_bytes / _GIB:.1f}: {shown}"


def _runners_up(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 2))
    for header in ("runner-up", "GPUs", "users", "$/Mtok", "lost by", "why", "checkpoint"):
        number = header in _NUMBERS
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    for loser in plan.runners_up:
        table.add_row(
            loser.name,
            str(loser.gpus),
            f"{loser.users:,}",
            _money(loser.usd_per_mtok),
            loser.constraint.value,
            loser.why,
            escape(loser.source),
        )
    return table


_NUMBERS = ("GPUs", "users", "$/Mtok")


def answers_as_json(answers: Sequence["Answer"]) -> dict[str, Any]:
    return {"plans": [_answer_as_json(answer) for answer in answers]}


def _answer_as_json(answer: "Answer") -> dict[str, Any]:
    plan = answer.plan
    common: dict[str, Any] = {
        "model": answer.subject.name,
        "warnings": list(answer.subject.warnings),
        "pool": {
            "name": plan.pool.name,
            "accelerator": plan.pool.accelerator.name,
            "gpus_per_node": plan.pool.gpus_per_node,
            "max_nodes": plan.pool.max_nodes,
            "market": plan.pool.market,
            "usd_per_gpu_hour": plan.pool.usd_per_gpu_hour,
            "price_note": plan.pool.price_note,
        },
        "targets": {
            "context_tokens": plan.targets.context_tokens,
            "input_tokens": plan.targets.input_tokens,
            "output_tokens": plan.targets.output_tokens,
            "ttft_s": plan.targets.ttft_s,
            "tpot_s": plan.targets.tpot_s,
            "users": plan.targets.users,
            "spare_groups": plan.targets.spare_groups,
            "attainment": plan.targets.attainment,
        },
        "fits": isinstance(plan, Plan),
        "considered": plan.considered,
        "search_s": round(answer.seconds, 4),
        "ruled_out": [
            {
                "candidate": str(loser.candidate),
                "checkpoint": loser.candidate.checkpoint.source,
                "constraint": loser.constraint.value,
                "problem": loser.problem,
                "possible": loser.possible,
            }
            for loser in plan.ruled_out
        ],
    }
    if isinstance(plan, NoPlan):
        return common | {
            "constraint": plan.constraint.value,
            "problem": plan.problem,
            "nearest": list(plan.nearest),
        }
    return common | {
        "checkpoint": plan.checkpoint.source,
        "objective": plan.objective.value,
        "serving": plan.serving.value,
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "users": plan.users,
        "tokens_per_s": _range_as_json(plan.tokens_per_s),
        "usd_per_hour": plan.usd_per_hour,
        "usd_per_mtok_out": _range_as_json(plan.usd_per_mtok),
        "wh_per_mtok_out": plan.energy.wh_per_mtok if plan.energy else None,
        "all_in_wh_per_mtok_out": plan.energy.all_in_wh_per_mtok if plan.energy else None,
        "co2_g_per_mtok_out": plan.energy.co2_g_per_mtok() if plan.energy else None,
        "limits": plan.limits,
        "why": plan.why,
        "notes": list(plan.notes),
        "availability": {
            "groups": plan.availability.groups,
            "spare_groups": plan.availability.spare_groups,
            "share_lost": plan.availability.share_lost,
            "failures_a_month": plan.availability.failures_a_month,
            "restart_s": plan.availability.restart_s,
        },
        "groups": [_group_as_json(group, plan, answer.subject.kv) for group in plan.groups],
        "options": [_option_as_json(option, answer.subject.kv) for option in answer.options],
        "runners_up": [
            {
                "name": loser.name,
                "checkpoint": loser.source,
                "serving": loser.serving.value,
                "gpus": loser.gpus,
                "users": loser.users,
                "usd_per_mtok_out": loser.usd_per_mtok,
                "constraint": loser.constraint.value,
                "why": loser.why,
            }
            for loser in plan.runners_up
        ],
    }


def _option_as_json(plan: Plan, kv: Dtype) -> dict[str, Any]:
    group = plan.serving_group
    sizes = group.parallelism
    return {
        "parallelism": {"tensor": sizes.tensor, "data": sizes.data, "expert": sizes.expert},
        "gpus": group.gpus,
        "usd_per_hour": group.usd_per_hour,
        "in_flight": group.rates.in_flight,
        "prefill_tokens_per_s": group.rates.prefill_tokens_per_s,
        "decode_tokens_per_s": group.rates.decode_tokens_per_s,
        "start_s": group.start_s,
        "why": plan.why,
        "engine": engine_settings(group, plan.pool, kv).engine,
    }


def _group_as_json(group: GroupPlan, plan: Plan, kv: Dtype) -> dict[str, Any]:
    settings = engine_settings(group, plan.pool, kv)
    layout, memory = group.layout, group.memory
    return {
        "role": group.role.value,
        "count": group.count,
        "gpus": group.gpus,
        "nodes": group.nodes,
        "tensor": layout.tensor,
        "data": layout.data,
        "expert": layout.expert,
        "redundant_experts": layout.redundant_experts,
        "all2all_backend": group.backend.value,
        "kv_tokens": group.kv_tokens,
        "max_concurrency": group.max_concurrency,
        "batch_per_rank": group.batch_per_rank,
        "users": group.users,
        "tokens_per_s": _range_as_json(group.tokens_per_s),
        "tpot_s": _range_as_json(group.tpot_s),
        "ttft_s": _range_as_json(group.ttft_s),
        "balance": _balance_as_json(group),
        "limit": group.limit,
        "time_limit": group.time_limit,
        "usd_per_hour": group.usd_per_hour,
        "memory_bytes": {
            "gpu": memory.memory_bytes,
            "experts": memory.weights.experts,
            "attention": memory.weights.attention,
            "dense": memory.weights.dense,
            "shared": memory.weights.shared,
            "embeddings": memory.weights.embeddings,
            "other": memory.weights.other,
            "activations": memory.activation_bytes,
            "buffers": memory.buffer_bytes,
            "graphs": memory.graph_bytes,
            "headroom": memory.headroom_bytes,
            "kv_cache": memory.kv_bytes,
        },
        "engine": settings.engine,
        "environment": settings.environment,
        "notes": list(settings.notes),
        "vllm_serve": vllm_serve_arguments(group, plan.checkpoint.source, kv),
        "group_spec": {
            "model_source": plan.checkpoint.source,
            "pool": plan.pool.name,
            "parallelism": {"tensor": layout.tensor, "data": layout.data, "expert": layout.expert},
            "max_model_len": memory.context_tokens,
            "usd_per_hour": group.usd_per_hour,
            "accelerator": plan.pool.accelerator.name,
            "engine": settings.engine,
        },
        "chart_values": chart_values(settings, plan.pool.name),
        "node_resources": {
            "gpus": settings.node.gpus,
            "cpus": settings.node.cpus,
            "memory_bytes": settings.node.memory_bytes,
            "shared_memory_bytes": settings.node.shared_memory_bytes,
        },
    }


def _balance_as_json(group: GroupPlan) -> dict[str, Any] | None:
    if group.balance is None:
        return None
    return {
        "before": group.balance.before,
        "after": group.balance.after,
        "skew": group.balance.skew,
        "copies": [
            {
                "redundant": option.redundant,
                "bytes_per_gpu": option.bytes_per_rank,
                "balancedness": option.balancedness,
                "tokens_per_s": option.rate,
            }
            for option in group.copies
        ],
    }


def _range_as_json(value: Range) -> dict[str, float]:
    return {"low": value.low, "expected": value.expected, "high": value.high}


def _range(value: Range, shown: Any) -> str:
    return f"{shown(value.low)}-{shown(value.high)}"


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _money(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _ms(value: Range) -> str:
    return f"{value.expected * 1000:.0f} ms ({value.low * 1000:.0f}-{value.high * 1000:.0f})"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
