"""What the failure of one GPU costs: it stops its whole group, and only that."""

from dataclasses import dataclass

GPU_HOURS_A_FAILURE = 50_000.0
"""419 unexpected stops of 16,384 H100 in 54 days (Llama 3, section 3.3.4)."""


@dataclass(frozen=True, slots=True)
class Availability:
    groups: int
    spare_groups: int
    """Of them, those that may fail while all users are still served."""
    share_lost: float
    """Of the capacity, until a failed group is back."""
    failures_a_month: float
    """Expected, of all groups together."""
    restart_s: float

    def __str__(self) -> str:
        lost = "nobody waits" if self.spare_groups else f"{self.share_lost:.0%} of capacity is lost"
        return (
            f"about {self.failures_a_month:.1f} failures a month; "
            f"{lost} for about {self.restart_s:.0f} s each"
        )


def groups_for(users: int | None, users_per_group: int, spare_groups: int) -> int:
    """Groups that serve `users` even while `spare_groups` are away; one without `users`."""
    serving = 1 if users is None else max(1, -(-users // users_per_group))
    return serving + spare_groups


def availability(
    groups: int, gpus_per_group: int, spare_groups: int, restart_s: float
) -> Availability:
    hours = 30 * 24.0
    return Availability(
        groups=groups,
        spare_groups=spare_groups,
        share_lost=1 / groups,
        failures_a_month=groups * gpus_per_group * hours / GPU_HOURS_A_FAILURE,
        restart_s=restart_s,
    )
