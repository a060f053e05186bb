"""What a controller says of its fleet, as tables for a terminal."""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expertmesh.cli.times import shown
from expertmesh.controller.overview import Overview
from expertmesh.controller.picture import GroupShown, ModelShown, Picture, PoolShown

_DECISIONS = 5
_BAR_WIDTH = 8
_NOTHING = "-"
_LATE_S = 5.0
_STYLES = {"ready": "green", "starting": "yellow", "draining": "magenta", "lost": "bold red"}


def render_status(overview: Overview, note: str = "", silent_s: float | None = None) -> Group:
    """`note`: about who answered, or why nobody does; `silent_s`: how long nobody has."""
    state, picture = overview.state, overview.state.picture
    parts: list[RenderableType] = [_head(overview, silent_s)]
    if note:
        parts.append(Text(note, style="red" if silent_s is not None else "yellow"))
    parts += [
        Text(f"failing: {step}: {why}", style="red") for step, why in sorted(state.problems.items())
    ]
    if picture is not None:
        parts += [_pools(picture), _groups(picture, state.at_s), _models(picture)]
        parts += _hindsight(picture)
    elif state.leads:
        parts.append(Text("no decision has been made yet", style="yellow"))
    parts.append(_decisions(overview.decisions))
    return Group(*parts)


def _head(overview: Overview, silent_s: float | None) -> Text:
    state, picture = overview.state, overview.state.picture
    parts = [state.platform, f"{shown(state.at_s)} UTC"]
    if picture is not None:
        parts.append(f"now ${picture.usd_per_hour:,.2f}/h")
    today = overview.today
    if isinstance(today, dict) and "error" not in today:
        parts.append(
            f"today ${today['capacity_usd']:,.2f} capacity, ${today['tariff_usd']:,.2f} revenue"
        )
    elif isinstance(today, dict):
        parts.append("the ledger does not answer")
    if not state.leads:
        parts.append("a follower")
    late_s = silent_s
    if late_s is None and picture is not None and state.at_s - picture.turned_at_s > _LATE_S:
        late_s = state.at_s - picture.turned_at_s
    if late_s is not None:
        parts.append(f"THIS IS {late_s:.0f} s OLD")
    return Text("  ".join(parts), style="bold" if late_s is None else "bold red")


def _table(title: str, *headers: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(
            header, justify="right" if header in right else "left", overflow="fold", min_width=2
        )
    return table


def _pools(picture: Picture) -> Table:
    table = _table(
        "pools",
        *("pool", "market", "$/node-hour", "nodes", "groups $/h", "idle $/h"),
        right=("$/node-hour", "nodes", "groups $/h", "idle $/h"),
    )
    for pool in picture.pools:
        table.add_row(
            pool.name,
            pool.market,
            f"{pool.usd_per_node_hour:,.2f}",
            _nodes(pool),
            f"{pool.groups_usd_per_hour:,.2f}",
            _NOTHING if pool.idle_usd_per_hour is None else f"{pool.idle_usd_per_hour:,.2f}",
        )
    return table


def _nodes(pool: PoolShown) -> str:
    return f"{'?' if pool.nodes is None else len(pool.nodes)}/{pool.max_nodes}"


def _groups(picture: Picture, now_s: float) -> Table:
    table = _table(
        "groups",
        *("group", "state", "ranks", "running", "waiting", "KV", "", "$/h", "note"),
        right=("running", "waiting", "KV", "$/h"),
    )
    for group in picture.groups:
        answered = [rank for rank in group.ranks if rank.answered_at_s is not None]
        kv = sum(rank.kv_usage for rank in answered) / len(answered) if answered else 0.0
        table.add_row(
            group.name,
            Text(group.state, style=_STYLES.get(group.state, "")),
            f"{len(answered)}/{group.data}",
            str(sum(rank.running for rank in answered)),
            str(sum(rank.waiting for rank in answered)),
            f"{kv:.0%}",
            bar(kv, 1.0),
            f"{group.usd_per_hour:,.2f}",
            _group_note(group, now_s),
        )
    return table


def _group_note(group: GroupShown, now_s: float) -> str:
    if group.message or group.expected_ready_at_s is None:
        return group.message
    return f"ready in about {max(0.0, group.expected_ready_at_s - now_s):.0f} s"


def _models(picture: Picture) -> Table:
    table = _table(
        "models",
        *("model", "groups", "queued", "running", "wait", "TTFT", "TPOT", "$/h", "bound by", "why"),
        right=("queued", "running", "wait", "TTFT", "TPOT", "$/h"),
    )
    for model in picture.models:
        spend = sum(g.usd_per_hour for g in picture.groups if g.model == model.name)
        mode = "" if model.mode == "act" else f" ({model.mode})"
        table.add_row(
            model.name + mode,
            f"{model.ready} of {model.wanted}",
            str(model.queued),
            str(model.running),
            "grows" if model.wait_s is None else f"{model.wait_s:.1f} s",
            _latency(model.ttft_s),
            _latency(model.tpot_s),
            f"{spend:,.2f}",
            model.binding.replace("_", " "),
            _why(model),
        )
    return table


def _hindsight(picture: Picture) -> list[RenderableType]:
    known = [(model.name, model.hindsight) for model in picture.models if model.hindsight]
    if not known:
        return []
    table = _table(
        "in hindsight",
        *("model", "over", "spent", "the least for the same work"),
        right=("over", "spent", "the least for the same work"),
    )
    for name, past in known:
        hours = past.span_s / 3600.0
        table.add_row(name, f"{hours:.1f} h", f"${past.spent_usd:,.2f}", f"${past.least_usd:,.2f}")
    return [table]


def _why(model: ModelShown) -> str:
    reason = model.reason or "no decision yet"
    if model.pending and model.pending not in reason:
        return f"{reason} ({model.pending})"
    return reason


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _decisions(decisions: Any) -> RenderableType:
    if isinstance(decisions, dict):
        return Text(f"the journal does not answer: {decisions.get('error')}", style="red")
    table = _table("last decisions", "no", "at (UTC)", "model", "does", "reason", right=("no",))
    for one in decisions[:_DECISIONS]:
        acts = ", ".join(f"{act['kind']} {act['group']}" for act in one.get("actions", ()))
        table.add_row(str(one["seq"]), shown(one["at_s"]), one["model"], acts, one["reason"])
    return table


def bar(value: float, most: float, width: int = _BAR_WIDTH) -> ProgressBar:
    """Without colours only the filled part is drawn."""
    return ProgressBar(total=max(most, 1e-12), completed=max(0.0, min(value, most)), width=width)
