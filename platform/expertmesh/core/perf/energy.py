"""What a group draws, and what a million tokens take of it."""

from dataclasses import dataclass

from expertmesh.core.domain.accelerator import Accelerator, Era

JOULES_PER_WH = 3600.0
WORLD_GRID_G_PER_KWH = 473.0
"""CO2 of electricity, world mean of 2024 (Ember Review 2025; recalled, unverified)."""
IDLE_SHARE = 0.15
"""Of TDP that a GPU draws while no step runs; unverified, a guess between idle reports."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Share of TDP while steps run, over the published rows of an era."""

    low: float
    expected: float
    high: float


DRAWS: dict[Era, Draw] = {
    Era.HOPPER: Draw(0.64, 0.83, 0.98),
    Era.BLACKWELL: Draw(0.48, 0.78, 0.95),
}
"""ml-energy/leaderboard (December 2025): extremes over all batches, and mean of the large ones."""
OTHER_DRAW = Draw(0.48, 0.80, 0.98)
"""Nobody has published rows: the extremes of both."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Of GPUs alone, unless said; low and high are for least and most draw."""

    watts_per_gpu: float
    joules_per_token: float
    joules_per_token_low: float
    joules_per_token_high: float
    all_in_joules_per_token: float | None
    """With the share of node, network and cooling; None when that is not published."""

    @property
    def wh_per_mtok(self) -> float:
        return self.joules_per_token * 1e6 / JOULES_PER_WH

    @property
    def all_in_wh_per_mtok(self) -> float | None:
        if self.all_in_joules_per_token is None:
            return None
        return self.all_in_joules_per_token * 1e6 / JOULES_PER_WH

    def co2_g_per_mtok(self, grid_g_per_kwh: float = WORLD_GRID_G_PER_KWH) -> float:
        """All-in where known, else of the GPUs alone."""
        wh = self.all_in_wh_per_mtok
        return (wh if wh is not None else self.wh_per_mtok) / 1000 * grid_g_per_kwh


def watts(accelerator: Accelerator, utilisation: float, share: float) -> float:
    """`utilisation` is the share of time in which steps run, and `share` the draw then, of TDP."""
    busy = min(1.0, max(0.0, utilisation))
    return accelerator.tdp_watts * (IDLE_SHARE * (1 - busy) + share * busy)


def energy(
    accelerator: Accelerator, gpus: int, tokens_per_s: float, utilisation: float = 1.0
) -> Energy | None:
    """Of `gpus` that make `tokens_per_s` together on average, at this utilisation.

    None without a rate or a TDP. The expected draw is within 30 % of every published row, 17 % in
    the median: batch and model move the rate far more than the draw.
    """
    if tokens_per_s <= 0 or accelerator.tdp_watts <= 0:
        return None
    draw = DRAWS.get(accelerator.era, OTHER_DRAW)

    def joules(share: float) -> float:
        return gpus * watts(accelerator, utilisation, share) / tokens_per_s

    all_in = None
    if accelerator.all_in_watts is not None:
        # The rest of a node runs whatever the GPUs do.
        beside = gpus * (accelerator.all_in_watts - accelerator.tdp_watts) / tokens_per_s
        all_in = joules(draw.expected) + beside
    return Energy(
        watts_per_gpu=watts(accelerator, utilisation, draw.expected),
        joules_per_token=joules(draw.expected),
        joules_per_token_low=joules(draw.low),
        joules_per_token_high=joules(draw.high),
        all_in_joules_per_token=all_in,
    )
