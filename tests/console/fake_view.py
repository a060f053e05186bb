"""Controllers as the console sees them: one with nothing, a busy one, and one that fails."""

import math
from dataclasses import dataclass, field
from typing import Any

from expertmesh.controller.picture import (
    ExpertHeat,
    GroupShown,
    HindsightShown,
    ModelShown,
    NodeShown,
    Picture,
    PoolShown,
    RankShown,
)
from expertmesh.controller.today import Today
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.errors import UpstreamUnavailable

NOW_S = 1_767_268_800.0
"""2026-01-01 12:00:00 UTC."""
QWEN, OSS = "qwen3-235b-a22b", "gpt-oss-120b"


@dataclass
class FakeView:
    shown: Picture | None = None
    experts: dict[str, ExpertHeat] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    stuck: bool = False
    journal_is_down: bool = False
    now_s: float = NOW_S

    def picture(self) -> Picture | None:
        return self.shown

    def heat(self) -> dict[str, ExpertHeat]:
        return self.experts

    async def decisions(self, limit: int, model: str | None) -> list[dict[str, Any]]:
        if self.journal_is_down:
            raise UpstreamUnavailable("store: connection refused")
        return [one for one in self.made if model in (None, one["model"])][:limit]

    async def explained(self, seq: int) -> dict[str, Any] | None:
        return None

    async def last_record(self, model: str) -> DecisionRecord | None:
        return None

    def not_ready(self) -> dict[str, str]:
        return self.problems

    def is_stuck(self) -> bool:
        return self.stuck

    # Of the whole API, which the console is a part of

    fleet = None
    metrics = None

    def exchange(self, report: object) -> None:
        return None

    def summaries(self) -> dict[str, dict[str, Any]]:
        return {}

    def doing(self) -> dict[str, Any]:
        return {}

    def flows(self) -> dict[str, Any]:
        return {}


@dataclass
class FakeToday:
    today: Today
    is_down: bool = False

    async def read(self) -> Today:
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")
        return self.today


@dataclass
class FakeRole:
    leads: bool = True
    leader_url: str | None = None


TODAY = Today(
    NOW_S, NOW_S - 43_200.0, 3_456.789, 41.2, 5_120.5, {"h200-od": 2900.0, "h200-spot": 556.789}
)
NOTHING_TODAY = Today(NOW_S, NOW_S - 43_200.0, 0.0, 0.0, 0.0, {})


def empty_view() -> FakeView:
    pools = (
        PoolShown("cpu-small", "local", None, 0.30, 2, _nodes("cpu-small", 2, 1), 0.0, 0.60),
        PoolShown("cpu-large", "local", None, 0.45, 2, _nodes("cpu-large", 2, 1), 0.0, 0.90),
    )
    model = ModelShown(
        *("tiny-moe", "act", 0, 2, None, 2.0, 0.05, NOW_S),
        reason="0 queued and 0 running requests at 8 per group need 0 groups; 0 wanted, 0 ready",
        binding="load",
        live_gateways=1,
    )
    return FakeView(Picture(NOW_S, pools, (), (model,), 1.5))


def busy_view() -> FakeView:
    groups = (
        _group(QWEN, "h200-od", 1, "ready", 16, ("od-0", "od-1"), 36.32),
        _group(QWEN, "h200-od", 4, "ready", 16, ("od-2", "od-3"), 36.32),
        _group(QWEN, "h200-spot", 5, "starting", 16, ("spot-0", "spot-1"), 17.60, ready_in_s=140),
        _group(OSS, "l40s", 2, "ready", 4, ("l40-0",), 5.20),
        _group(OSS, "l40s", 3, "draining", 4, ("l40-1",), 5.20),
    )
    pools = (
        PoolShown("h200-od", "on-demand", "H200", 18.16, 8, _nodes("od", 5, 8), 72.64, 18.16),
        PoolShown("h200-spot", "spot", "H200", 8.80, 8, _nodes("spot", 2, 8), 17.60, 0.0),
        PoolShown("l40s", "on-demand", "L40S", 5.20, 4, _nodes("l40", 2, 4), 10.40, 0.0),
    )
    models = (
        ModelShown(
            *(QWEN, "act", 1, 6, 120.0, 2.0, 0.05, NOW_S - 0.4),
            **_reason("a load of 2.61 groups, 214 queued; 3 wanted, 2 ready and 1 on the way"),
            need=3,
            wanted=3,
            ready=2,
            coming=1,
            queued=214,
            running=487,
            oldest_wait_s=3.4,
            live_gateways=2,
            wait_s=4.2,
            load=2.61,
            load_needed=2.9,
            load_ready=2.02,
            arrivals_per_s=38.5,
            output_tokens_per_s=21_340.0,
            ttft_s=2.31,
            tpot_s=0.041,
            target={"h200-od/t1d16e16": 2, "h200-spot/t1d16e16": 1},
            hindsight=HindsightShown(NOW_S - 180, 86_400.0, 1_743.36, 1_210.1),
        ),
        ModelShown(
            *(OSS, "advise", 0, 4, None, 1.0, 0.03, NOW_S - 0.4),
            **_reason("a load of 0.74 groups; 1 wanted, 1 ready"),
            need=1,
            wanted=1,
            ready=1,
            queued=0,
            running=61,
            live_gateways=2,
            wait_s=0.0,
            load=0.74,
            load_needed=0.9,
            load_ready=1.0,
            arrivals_per_s=12.25,
            output_tokens_per_s=4_210.0,
            ttft_s=0.38,
            tpot_s=0.019,
            target={"l40s/t4d1e4": 1},
            hindsight=HindsightShown(NOW_S - 180, 43_200.0, 100.0, 90.15),
        ),
    )
    heat = {g.name: _heat(g, 128) for g in groups if g.state in ("ready", "draining")}
    spend = sum(pool.groups_usd_per_hour + (pool.idle_usd_per_hour or 0.0) for pool in pools)
    picture = Picture(NOW_S - 0.4, pools, groups, models, spend)
    return FakeView(picture, heat, busy_decisions())


def failing_view() -> FakeView:
    view = busy_view()
    assert view.shown is not None
    lost = view.shown.groups[1]
    groups = (
        view.shown.groups[0],
        GroupShown(
            *(lost.name, lost.model, lost.pool, "lost", NOW_S - 47, lost.requested_at_s, None),
            "rank 9 does not answer: 3 probes in a row; Serve may restart it until 12:00:13",
            *(lost.usd_per_hour, lost.tensor, lost.data, lost.expert),
            tuple(RankShown(rank.index, rank.node) for rank in lost.ranks),
        ),
        *view.shown.groups[2:],
    )
    pools = tuple(
        PoolShown(
            *(pool.name, pool.market, pool.accelerator, pool.usd_per_node_hour, pool.max_nodes),
            *(None, pool.groups_usd_per_hour, None),
        )
        for pool in view.shown.pools
    )
    view.shown = Picture(
        view.shown.turned_at_s, pools, groups, view.shown.models, view.shown.usd_per_hour
    )
    view.experts = {}
    view.problems = {
        "journal": "failed 12 times in a row: UpstreamUnavailable: store: connection refused",
        "observe nodes": "failed 5 times in a row: GET: no answer from Ray's dashboard",
    }
    view.journal_is_down = True
    return view


def _reason(text: str) -> dict[str, Any]:
    return {"reason": text, "binding": "load"}


def _nodes(prefix: str, count: int, workers: int) -> tuple[NodeShown, ...]:
    return tuple(
        NodeShown(f"{prefix}-{n}", f"{prefix}-{n}.example", float(workers)) for n in range(count)
    )


def _group(
    model: str,
    pool: str,
    number: int,
    state: str,
    ranks: int,
    nodes: tuple[str, ...],
    usd_per_hour: float,
    ready_in_s: float | None = None,
) -> GroupShown:
    serves = state in ("ready", "draining")
    shown = []
    for index in range(ranks):
        node = nodes[index * len(nodes) // ranks]
        if not serves:
            shown.append(RankShown(index, node))
            continue
        wave = math.sin(index * 1.7 + number)
        shown.append(
            RankShown(
                *(index, node, NOW_S - 0.6),
                running=round(30 + 12 * wave),
                waiting=max(0, round(3 * wave)),
                max_running=64,
                kv_usage=round(0.55 + 0.3 * wave, 4),
            )
        )
    return GroupShown(
        f"em-{model}-{pool}-{number}",
        model,
        pool,
        state,
        NOW_S - 760.0 * number,
        NOW_S - 760.0 * number - 180,
        None if ready_in_s is None else NOW_S + ready_in_s,
        "" if state != "draining" else "a lower need has held for 6 minutes; 3 requests in flight",
        *(usd_per_hour, 1, ranks, ranks),
        tuple(shown),
    )


def _heat(group: GroupShown, experts: int) -> ExpertHeat:
    share = experts // group.data
    ranks = {
        rank.index: {
            str(expert): round(4000 * (1.0 + 0.9 * math.sin(expert * 2.4) * math.cos(expert / 7)))
            for expert in range(rank.index * share, (rank.index + 1) * share)
        }
        for rank in group.ranks
    }
    sums = [sum(tokens.values()) for tokens in ranks.values()]
    return ExpertHeat(ranks, True, round(max(sums) * len(sums) / sum(sums), 3))


def busy_decisions() -> list[dict[str, Any]]:
    def made(seq: int, ago_s: float, model: str, reason: str, *acts: str) -> dict[str, Any]:
        actions = [dict(zip(("kind", "group", "why"), act.split("|"), strict=True)) for act in acts]
        return {
            "seq": seq,
            "at_s": NOW_S - ago_s,
            "model": model,
            "reason": reason,
            "need": 2,
            "wanted": 3,
            "pending": None,
            "binding": "load",
            "actions": actions,
            "transitions": [],
            "demand": {},
        }

    return [
        made(
            *(812, 42, QWEN, "a load of 2.61 groups now and 2.74 in 180 s needs 2.9 groups"),
            f"start|em-{QWEN}-h200-spot-5|the cheapest that can be had, $17.60/h",
        ),
        made(811, 97, QWEN, "a load of 2.38 groups; the higher need has held for 12.0 s"),
        made(
            *(810, 130, OSS, "a load of 0.74 groups; the lower need has held for 6 minutes"),
            f"drain|em-{OSS}-l40s-3|the dearest of those that can go, $5.20/h",
        ),
        made(809, 185, OSS, "a load of 0.81 groups; 2 held, as starting again takes 4 minutes"),
        made(
            *(808, 2280, QWEN, "a load of 1.6 groups; spot zone b was lost 9 minutes ago"),
            f"start|em-{QWEN}-h200-od-4|spot is left alone until 11:31, $36.32/h",
        ),
    ]
