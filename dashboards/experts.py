"""Expert parallelism: is the work even over experts, layers and ranks, and do caches suffice?"""

from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from dashboards.alerts import CACHED
from dashboards.panels import Panels, bars, board, finished, lines, query
from dashboards.queries import increase, rate, recorded, series
from expertmesh.telemetry import metrics, ray_metrics

_COUNTED = " Counted by CPU workers alone: vLLM exports no tokens by expert for GPUs."


def build() -> models.Dashboard:
    made = board(
        "expert parallelism",
        "experts",
        "Balance over experts, layers and ranks; batches, KV cache and preemptions of all groups.",
    )
    return finished(made, (("Balance", _balance()), ("Engines", _engines()), ("Nodes", _nodes())))


def _balance() -> Panels:
    by_expert = f"sum by (model, group, expert) ({rate(metrics.EXPERT_TOKENS)})"
    by_rank = f"sum by (model, group, rank) ({rate(metrics.RANK_TOKENS)})"
    layers = series(metrics.LAYER_IMBALANCE)
    return (
        lines(
            "Expert imbalance by group",
            "Tokens of the busiest expert over the mean of all experts: 1 is even." + _COUNTED,
            "none",
        )
        .span(8)
        .with_target(
            query(
                f"max by (model, group) ({by_expert}) / avg by (model, group) ({by_expert})",
                "{{group}}",
            )
        ),
        lines(
            "Layer imbalance by group",
            "The same within one layer, which is what a step waits for: the worst layer and the "
            "mean of all layers, over the last minute." + _COUNTED,
            "none",
        )
        .span(8)
        .with_target(query(f"max by (group) ({layers})", "{{group}} worst layer"))
        .with_target(query(f"avg by (group) ({layers})", "{{group}} mean")),
        lines(
            "Rank imbalance by group",
            "Tokens for the experts of the busiest rank over the mean of the ranks." + _COUNTED,
            "none",
        )
        .span(8)
        .with_target(
            query(
                f"max by (model, group) ({by_rank}) / avg by (model, group) ({by_rank})",
                "{{group}}",
            )
        ),
        bars(
            "Imbalance by layer",
            "Tokens of each layer's busiest expert over the mean of its experts; the mean of the "
            "groups." + _COUNTED,
            "none",
        )
        .span(8)
        .with_target(query(f"avg by (layer) ({layers})", "layer {{layer}}", instant=True)),
        bars(
            "Tokens by expert",
            "Share of the time shown's tokens that each expert was given, all groups together."
            + _COUNTED,
            "percentunit",
        )
        .orientation(common.VizOrientation.VERTICAL)
        .span(8)
        .with_target(
            query(
                f"sum by (expert) ({increase(metrics.EXPERT_TOKENS)})"
                f" / scalar(sum({increase(metrics.EXPERT_TOKENS)}))",
                "{{expert}}",
                instant=True,
            )
        ),
        bars(
            "Experts by share of the mean",
            "How many experts of all groups get at most a quarter, half, the mean, twice and four "
            "times of what the mean expert of their group gets." + _COUNTED,
            "short",
        )
        .span(8)
        .with_target(_below(by_expert, 0.25, "up to 1/4"))
        .with_target(_below(by_expert, 0.5, "up to 1/2"))
        .with_target(_below(by_expert, 1, "up to the mean"))
        .with_target(_below(by_expert, 2, "up to twice"))
        .with_target(_below(by_expert, 4, "up to 4 times")),
        lines(
            "Dispatched to experts",
            "Tokens each second that the all-to-all exchange takes to the experts of each group's "
            "ranks, over all layers; each counts once for each expert it goes to." + _COUNTED,
            "suffix:tokens/s",
        )
        .span(24)
        .with_target(query(by_rank, "{{group}} rank {{rank}}")),
    )


def _below(by_expert: str, share: float, legend: str) -> Dataquery:
    mean = f"avg by (model, group) ({by_expert})"
    ratio = f"{by_expert} / on (model, group) group_left {mean}"
    return query(f"count({ratio} <= {share:g}) or vector(0)", legend, instant=True)


def _engines() -> Panels:
    def of(metric: metrics.Metric) -> str:
        return f"sum by (group) ({series(metric)})"

    return (
        lines("Running", "Requests in the batches of each group's engines.", "short")
        .span(8)
        .with_target(query(of(metrics.GROUP_RUNNING), "{{group}}")),
        lines("Waiting inside engines", "Requests queued behind the batches.", "short")
        .span(8)
        .with_target(query(of(metrics.GROUP_WAITING), "{{group}}")),
        lines("KV cache in use", "Mean over the ranks of each group.", "percentunit")
        .max(1)
        .span(8)
        .with_target(query(of(metrics.GROUP_KV_USE), "{{group}}")),
        lines(
            "Preemptions",
            "Requests each second that lost their place in the KV cache and are computed again.",
            "ops",
        )
        .span(8)
        .with_target(query(f"sum by (group) ({rate(metrics.GROUP_PREEMPTIONS)})", "{{group}}")),
        lines(
            "Prompt tokens from the cache",
            "Share of the prompt tokens that need not be computed, over five minutes.",
            "percentunit",
        )
        .max(1)
        .span(8)
        .with_target(query(recorded(CACHED), "{{model}}")),
        lines("Tokens generated", "By each group, each second.", "suffix:tokens/s")
        .span(8)
        .with_target(
            query(f"sum by (group) ({rate(metrics.GROUP_TOKENS, direction='out')})", "{{group}}")
        ),
    )


def _nodes() -> Panels:
    def of(metric: metrics.Metric, by: str = "max") -> str:
        return f"{by} by (instance) ({series(metric)})"

    used, free = (
        of(ray_metrics.NODE_GPU_MEMORY_USED, "sum"),
        of(ray_metrics.NODE_GPU_MEMORY_FREE, "sum"),
    )
    return (
        lines(
            "Processors",
            "Of each Ray node, as Ray itself tells. Nodes of one machine tell that machine's.",
            "percent",
        )
        .max(100)
        .span(8)
        .with_target(query(of(ray_metrics.NODE_CPU), "{{instance}}")),
        lines(
            "Memory in use", "Share of each Ray node's memory, as Ray itself tells.", "percentunit"
        )
        .max(1)
        .span(8)
        .with_target(
            query(
                f"{of(ray_metrics.NODE_MEMORY_USED)} / {of(ray_metrics.NODE_MEMORY)}",
                "{{instance}}",
            )
        ),
        lines(
            "Network of nodes",
            "What each Ray node's network cards carry: of groups over several nodes also the "
            "all-to-all exchange, unless it goes by RDMA, which the kernel does not count.",
            "Bps",
        )
        .span(8)
        .with_target(query(of(ray_metrics.NODE_SENDS), "{{instance}} sent"))
        .with_target(query(of(ray_metrics.NODE_RECEIVES), "{{instance}} received")),
        lines(
            "Accelerators",
            "Mean over the accelerators of each Ray node; nodes without one are not shown.",
            "percent",
        )
        .max(100)
        .span(12)
        .with_target(query(of(ray_metrics.NODE_GPU, "avg"), "{{instance}}")),
        lines(
            "Accelerators' memory in use",
            "Share of all accelerators' memory of each Ray node; nodes without one are not shown.",
            "percentunit",
        )
        .max(1)
        .span(12)
        .with_target(query(f"{used} / ({used} + {free})", "{{instance}}")),
    )
