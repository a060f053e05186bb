"""What share of the ideal hardware and software of one era reach."""

from dataclasses import dataclass, replace

from expertmesh.core.domain.accelerator import Era


@dataclass(frozen=True, slots=True)
class Range:
    """A figure with its uncertainty: four of five published rows lie between low and high."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    memory: float
    """Of the published memory bandwidth, where caches, states and plain weights are read."""
    experts_memory: float
    """The same where experts' weights are read, a few rows for each."""
    compute: float
    """Of the published dense FLOPs."""
    fixed_s_per_layer: float
    """Launches, norms, routing and waiting, whatever the batch."""
    fixed_s_per_sequence: float
    """Scheduling, sampling and bookkeeping on the host, for each sequence of a rank's step."""
    rate_low: float
    """Published over predicted rate: the tenth of rows that fare worst lies below."""
    rate_high: float
    rows: int
    """Published rows that it is fitted on; 0: borrowed from another era."""

    def rate(self, expected: float) -> Range:
        """The range of a rate in tokens a second that was predicted as `expected`."""
        return Range(expected * self.rate_low, expected, expected * self.rate_high)

    def time(self, expected: float) -> Range:
        """The range of a time in seconds that was predicted as `expected`."""
        return Range(expected / self.rate_high, expected, expected / self.rate_low)


# Printed by `python -m benchmarks.planner_accuracy --fit`; not tuned by hand.
EFFICIENCIES: dict[Era, Efficiency] = {
    Era.HOPPER: Efficiency(
        memory=0.9,
        experts_memory=0.442,
        compute=0.65,
        fixed_s_per_layer=144e-6,
        fixed_s_per_sequence=25.0e-6,
        rate_low=0.83,
        rate_high=1.26,
        rows=21,
    ),
    Era.BLACKWELL: Efficiency(
        memory=0.836,
        experts_memory=0.385,
        compute=0.521,
        fixed_s_per_layer=151e-6,
        fixed_s_per_sequence=5.0e-6,
        rate_low=0.86,
        rate_high=1.14,
        rows=17,
    ),
}
BORROWED_RATE_LOW = 0.82
BORROWED_RATE_HIGH = 1.33
"""Of rates predicted with another era's numbers: how Hopper and Blackwell do with each other's."""


def efficiency(era: Era) -> Efficiency:
    """Of an era; those that nobody has published rows for borrow Hopper's, with a wider range."""
    known = EFFICIENCIES.get(era)
    if known is not None:
        return known
    return replace(
        EFFICIENCIES[Era.HOPPER],
        rate_low=BORROWED_RATE_LOW,
        rate_high=BORROWED_RATE_HIGH,
        rows=0,
    )
