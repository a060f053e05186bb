"""What share of the ideal hardware and software of one era reach."""

from dataclasses import dataclass

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


# Printed by `python -m benchmarks.planner_accuracy --fit`; do not tune by hand.
EFFICIENCIES: dict[Era, Efficiency] = {
    Era.HOPPER: Efficiency(0.8, 0.45, 0.6, 150e-6, 15e-6, 0.7, 1.4, 0),
    Era.BLACKWELL: Efficiency(0.7, 0.4, 0.5, 150e-6, 15e-6, 0.7, 1.4, 0),
}


def efficiency(era: Era) -> Efficiency:
    """Of an era; eras that nobody has published rows for borrow Hopper's with a wider range."""
    return EFFICIENCIES[era]
