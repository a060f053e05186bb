"""Which controller may act: at most one at a time holds a lease.

A lease is a record that is written only against the version that was read. Nobody compares another
machine's clock with its own: a follower counts from when it last saw the record change, and the
holder counts from before it sent its last successful write. The holder stops acting earlier than a
follower may take over, so that the two never act together. These are the rules of Kubernetes'
client-go (tools/leaderelection).

`now_s` is a monotonic clock of this machine throughout.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from expertmesh.core.domain.lease import LeaseRecord


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    duration_s: float = 10.0
    """A follower takes over when it has not seen the record change for this long."""
    act_for_s: float = 8.0
    """The holder acts for this long after it sent a write that succeeded."""
    renew_every_s: float = 2.0
    look_every_s: float = 1.0
    """Of a follower, and of a holder whose renewal failed."""
    request_timeout_s: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.renew_every_s < self.act_for_s < self.duration_s:
            raise ValueError(
                f"0 < renew_every_s ({self.renew_every_s:g}) < act_for_s ({self.act_for_s:g}) < "
                f"duration_s ({self.duration_s:g}) must hold"
            )


class LeaseStore(Protocol):
    """Raises UpstreamUnavailable when the outcome is not known."""

    async def read(self) -> LeaseRecord: ...

    async def write(self, wanted: LeaseRecord) -> LeaseRecord | None:
        """Replaces the record of `wanted.version` and answers the new one; None when that version
        is not the newest any more."""
        ...


class LeaseStep(StrEnum):
    WAIT = "wait"
    TAKE = "take"
    RENEW = "renew"


@dataclass(frozen=True, slots=True)
class LeaseView:
    """What one candidate knows of the lease."""

    me: str
    """`<host>_<random>`: no other process has it."""
    url: str
    """Where this process listens, and so nobody else."""
    timing: LeaseTiming = LeaseTiming()
    record: LeaseRecord | None = None
    """As last seen; None before the first look."""
    changed_at_s: float = 0.0
    """When the record was first seen with this version."""
    renewed_at_s: float | None = None
    """When the newest successful write of this candidate was sent; None while it does not lead."""

    @property
    def act_until_s(self) -> float:
        if self.renewed_at_s is None:
            return float("-inf")
        return self.renewed_at_s + self.timing.act_for_s

    @property
    def expires_at_s(self) -> float:
        """When a follower may take the lease; the longer wait counts where two timings meet."""
        held_s = self.record.duration_s if self.record is not None else 0.0
        return self.changed_at_s + max(held_s, self.timing.duration_s)

    @property
    def leader_url(self) -> str | None:
        """Of whoever holds the lease as far as is known; it may have ended since."""
        record = self.record
        return record.url if record is not None and record.holder is not None else None

    def may_act(self, now_s: float) -> bool:
        return now_s < self.act_until_s

    def next_step(self, now_s: float) -> LeaseStep:
        record = self.record
        if record is None:
            return LeaseStep.WAIT
        if self.may_act(now_s):
            return LeaseStep.RENEW if now_s >= self._renew_at_s else LeaseStep.WAIT
        # Under the own name: it was given up, or a write was never answered.
        if record.holder is None or record.holder == self.me or now_s >= self.expires_at_s:
            return LeaseStep.TAKE
        return LeaseStep.WAIT

    def wake_at_s(self, now_s: float) -> float:
        """When to look or to write again."""
        look_s = now_s + self.timing.look_every_s
        due_s = self._renew_at_s if self.may_act(now_s) else self.expires_at_s
        # What is overdue has just been tried in vain.
        return min(look_s, due_s) if due_s > now_s else look_s

    @property
    def _renew_at_s(self) -> float:
        return (self.renewed_at_s or 0.0) + self.timing.renew_every_s

    def saw(self, record: LeaseRecord, now_s: float) -> "LeaseView":
        """`now_s`: after the answer came. A record of somebody else ends the own leadership."""
        changed_at_s = self.changed_at_s
        if self.record is None and self._is_predecessor(record):
            changed_at_s = float("-inf")
        elif self.record is None or record.version != self.record.version:
            changed_at_s = now_s
        return replace(
            self,
            record=record,
            changed_at_s=changed_at_s,
            renewed_at_s=self.renewed_at_s if record.holder == self.me else None,
        )

    def wrote(self, record: LeaseRecord, sent_at_s: float, now_s: float) -> "LeaseView":
        """A take or a renewal succeeded. `sent_at_s`: before it was sent."""
        return replace(self.saw(record, now_s), renewed_at_s=sent_at_s)

    def resigned(self) -> "LeaseView":
        """Does not act any more, whatever the record says."""
        return replace(self, renewed_at_s=None)

    def claim(self) -> LeaseRecord:
        """What to write in order to take or to renew."""
        known = self.record if self.record is not None else LeaseRecord(None)
        return LeaseRecord(
            holder=self.me,
            url=self.url,
            duration_s=self.timing.duration_s,
            transitions=known.transitions + (known.holder != self.me),
            version=known.version,
        )

    def release(self) -> LeaseRecord | None:
        """What to write in order to give the lease back; None when it is not held."""
        if self.record is None or self.record.holder != self.me:
            return None
        return replace(self.record, holder=None, url="", duration_s=0.0)

    def _is_predecessor(self, record: LeaseRecord) -> bool:
        """It listened on this host where only this process listens now, so it has ended."""
        return (
            record.holder is not None
            and record.url == self.url
            and record.holder.rpartition("_")[0] == self.me.rpartition("_")[0]
        )
