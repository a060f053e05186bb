"""Which ranks are sound: ejected on the first evidence, probed, tried with one request, back.

    healthy --evidence--> ejected --good probe--> on trial --one answer--> healthy
                             ^                       |
                             +-------evidence--------+
    healthy --refuses for want of room--> busy --good probe--> healthy

Only ranks that have been ejected cost memory, and only while their group is in the fleet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from zlib import crc32


class Evidence(StrEnum):
    """What tells that a rank or its group is not sound."""

    REFUSED = "refused"
    RESET = "reset"
    SERVER_ERROR = "server_error"
    """A 5xx answer but 501, which the model cannot do anywhere."""
    STALL = "stall"
    BAD_ANSWER = "bad_answer"
    """No HTTP, or an answer that ends without an event."""
    BUSY = "busy"
    """A 408, 429 or 503 answer: sound, but without room. It must be left alone for a moment: who
    refuses at once always looks least loaded."""

    @property
    def of_rank(self) -> bool:
        """Tells about the rank alone; any other about its group, as its ranks step together."""
        return self in (Evidence.REFUSED, Evidence.RESET, Evidence.BUSY)


class RankState(StrEnum):
    HEALTHY = "healthy"
    EJECTED = "ejected"
    TRIAL = "trial"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class HealthConfig:
    first_probe_s: float = 0.5
    """From the ejection to the first probe; doubles with every probe that fails."""
    longest_probe_s: float = 10.0
    flap_within_s: float = 30.0
    """Ejected again so soon after its return, a rank starts with four times the last delay."""
    longest_flap_probe_s: float = 60.0
    probe_timeout_s: float = 5.0
    """A probe of which nothing is heard for so long is made again."""
    jitter: float = 0.25
    """Share of a delay that depends on the names, so that probes spread out."""


class _Record:
    """A rank that has been ejected at least once."""

    __slots__ = (
        "ejected_at_s",
        "era",
        "failed_probes",
        "flaps",
        "group",
        "probe_at_s",
        "returned_at_s",
        "state",
        "trials",
    )

    def __init__(self, group: str) -> None:
        self.group = group
        self.state = RankState.HEALTHY
        self.era = 0
        """Grows with every ejection and trial: news of requests sent before then are stale."""
        self.ejected_at_s = 0.0
        self.returned_at_s: float | None = None
        self.probe_at_s = 0.0
        self.failed_probes = 0
        self.flaps = 0
        self.trials = 0
        """Requests in flight that were sent on trial."""


class Health:
    """`base_url` names a rank. Times are monotonic."""

    __slots__ = ("_config", "_groups", "_impaired", "_records", "_salt", "version")

    def __init__(self, config: HealthConfig, salt: str = "") -> None:
        """`salt`: the worker's name, so that not all workers probe a rank at the same moment."""
        self._config = config
        self._salt = salt
        self._groups: Mapping[str, tuple[str, ...]] = {}
        self._records: dict[str, _Record] = {}
        self._impaired: dict[str, _Record] = {}
        self.version = 0
        """Grows with every change of what `state` and `usable` say."""

    def __len__(self) -> int:
        """Number of ranks of which something is remembered."""
        return len(self._records)

    @property
    def all_healthy(self) -> bool:
        return not self._impaired

    def keep(self, groups: Mapping[str, tuple[str, ...]]) -> None:
        """The ranks of every group that is there; all others are forgotten."""
        self._groups = groups
        if self._records:
            self.version += 1
            owner = {url: group for group, urls in groups.items() for url in urls}
            for table in (self._records, self._impaired):
                for url in [u for u, record in table.items() if owner.get(u) != record.group]:
                    del table[url]

    def state(self, base_url: str) -> RankState:
        record = self._records.get(base_url)
        return RankState.HEALTHY if record is None else record.state

    def usable(self, base_url: str) -> bool:
        """Healthy, or on trial without a request under way."""
        record = self._impaired.get(base_url)
        return record is None or (record.state is RankState.TRIAL and record.trials == 0)

    def ejected_at_s(self, base_url: str) -> float | None:
        """None unless it is ejected now."""
        record = self._impaired.get(base_url)
        return record.ejected_at_s if record and record.state is RankState.EJECTED else None

    def begin(self, base_url: str) -> int:
        """A request is sent there. Returns the era, to hand back with the news of it."""
        record = self._records.get(base_url)
        if record is None:
            return 0
        if record.state is RankState.TRIAL:
            record.trials += 1
            self.version += 1
        return record.era

    def answered(self, base_url: str, era: int, now_s: float) -> None:
        """A good answer has begun. Once a request, before `end`; a refusal of the request itself
        is a good answer too."""
        record = self._impaired.get(base_url)
        # In an era of ejection only what was sent for want of any other rank can be answered.
        if record is not None and record.era == era and record.state is not RankState.BUSY:
            record.state = RankState.HEALTHY
            record.returned_at_s = now_s
            record.failed_probes = 0
            record.trials = 0
            del self._impaired[base_url]
            self.version += 1

    def end(self, base_url: str, era: int) -> None:
        """Nothing of the request is under way any more, whatever became of it."""
        record = self._impaired.get(base_url)
        if record is not None and record.era == era and record.state is RankState.TRIAL:
            record.trials -= 1
            self.version += 1

    def failed(self, group: str, base_url: str, era: int, evidence: Evidence, now_s: float) -> None:
        """After `end`. Stale news and those of a group that has gone change nothing."""
        urls = self._groups.get(group)
        if urls is None or base_url not in urls:
            return
        record = self._records.get(base_url)
        if record is not None and record.era != era:
            return
        if record is not None and record.state is RankState.EJECTED:
            record.ejected_at_s = now_s  # the next request without a choice tries another one
            return
        if evidence is Evidence.BUSY:
            self._pause(group, base_url, now_s)
            return
        for url in (base_url,) if evidence.of_rank else urls:
            self._eject(group, url, now_s)

    def due_probes(self, now_s: float) -> tuple[str, ...]:
        """The ranks to probe now; each is named once until its probe is reported or too old."""
        if not self._impaired:
            return ()
        due = []
        for url, record in self._impaired.items():
            if record.state is not RankState.TRIAL and now_s >= record.probe_at_s:
                record.probe_at_s = now_s + self._config.probe_timeout_s
                due.append(url)
        return tuple(due)

    def probe_ok(self, base_url: str) -> None:
        """The rank is on trial from now on, or back when it was only busy."""
        record = self._impaired.get(base_url)
        if record is None:
            return
        if record.state is RankState.BUSY:
            record.state = RankState.HEALTHY
            del self._impaired[base_url]
            self.version += 1
        elif record.state is RankState.EJECTED:
            record.state = RankState.TRIAL
            record.era += 1
            record.trials = 0
            self.version += 1

    def probe_failed(self, base_url: str, now_s: float) -> None:
        record = self._impaired.get(base_url)
        if record is None:
            return
        if record.state is RankState.BUSY:
            self._eject(record.group, base_url, now_s)
        elif record.state is RankState.EJECTED:
            record.failed_probes += 1
            record.probe_at_s = now_s + self._delay_s(base_url, record)

    def _pause(self, group: str, url: str, now_s: float) -> None:
        record = self._records.get(url)
        if record is None:
            record = self._records[url] = _Record(group)
        record.state = RankState.BUSY
        record.probe_at_s = now_s + self._config.first_probe_s
        self._impaired[url] = record
        self.version += 1

    def _eject(self, group: str, url: str, now_s: float) -> None:
        record = self._records.get(url)
        if record is None:
            record = self._records[url] = _Record(group)
        if record.state is RankState.EJECTED:
            return
        returned_at_s = record.returned_at_s
        if record.state is RankState.TRIAL or (
            returned_at_s is not None and now_s - returned_at_s < self._config.flap_within_s
        ):
            record.flaps += 1
        else:
            record.flaps = 0
        record.state = RankState.EJECTED
        record.era += 1
        record.ejected_at_s = now_s
        record.failed_probes = 0
        record.trials = 0
        record.probe_at_s = now_s + self._delay_s(url, record)
        self._impaired[url] = record
        self.version += 1

    def _delay_s(self, url: str, record: _Record) -> float:
        config = self._config
        longest_s = config.longest_flap_probe_s if record.flaps else config.longest_probe_s
        doublings = min(record.failed_probes + 2 * record.flaps, 32)
        delay_s = min(longest_s, config.first_probe_s * 2.0**doublings)
        name = f"{self._salt} {url} {record.era} {record.failed_probes}"
        return delay_s * (1.0 - config.jitter * crc32(name.encode()) / 2**32)
