"""The record by which controllers agree on which of them leads."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    holder: str | None
    """`<host>_<random>` of one process; None when it was given back or never taken."""
    url: str = ""
    """Where the holder's HTTP API answers."""
    duration_s: float = 0.0
    """What the holder asks the others to wait."""
    transitions: int = 0
    """How often the holder has changed."""
    version: str = ""
    """Differs after every write; empty when there is no record yet."""
