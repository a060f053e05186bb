"""What this worker has under way on each rank, with what the fleet reports about its group."""

from collections.abc import Collection, Sequence
from operator import attrgetter

from expertmesh.core.domain.fleet import GroupLoad
from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.health import Health, RankState
from expertmesh.core.routing.prefix import PrefixIndex

_QUEUES = 1e6
_KV_STEP = 1e-6
_in_flight = attrgetter("in_flight")


class GroupWork:
    """Shared by the ranks of a group."""

    __slots__ = ("_reported", "full", "in_flight", "queues", "ranks")

    def __init__(self) -> None:
        self.in_flight = 0
        self.ranks = 1
        self.full = False
        """It gets nothing new."""
        self.queues = False
        """Requests wait inside its engines."""
        self._reported = 0.0

    def report(self, load: GroupLoad | None) -> None:
        if load is None:
            self.queues, self._reported = False, 0.0
            return
        self.queues = load.waiting > 0
        # In tenths: smaller differences are noise, and would send all ties to one group.
        self._reported = _QUEUES * self.queues + _KV_STEP * int(10 * load.kv_usage)

    @property
    def pressure(self) -> float:
        """Decides between ranks that have the same number of requests: queues inside the engines
        weigh more than the requests per rank, and those more than the use of the KV cache."""
        return self._reported + self.in_flight / self.ranks


class RankWork:
    __slots__ = ("bit", "candidate", "group", "healthy", "in_flight", "seed", "table")

    def __init__(
        self, candidate: Candidate, group: GroupWork, table: "RankTable | None" = None
    ) -> None:
        self.candidate = candidate
        self.group = group
        self.in_flight = 0
        self.table = table
        """The model's last table that held the rank; None for an external provider."""
        self.healthy = True
        """As of the table's version."""
        self.seed = 0
        """For sessions, see `rank_seed`."""
        self.bit = 0
        """For prefixes, see `PrefixIndex`."""


class RankTable:
    """The ranks of a model's ready groups."""

    __slots__ = (
        "by_bit",
        "groups",
        "healthy",
        "healthy_bits",
        "in_flight",
        "index",
        "only",
        "orders",
        "ranks",
        "trial",
        "twice",
        "version",
    )

    def __init__(self, ranks: tuple[RankWork, ...], index: PrefixIndex) -> None:
        self.ranks = ranks
        self.only = ranks[0].candidate if len(ranks) == 1 else None
        self.in_flight = sum(rank.in_flight for rank in ranks)
        """Requests on all of them."""
        self.orders: dict[int, tuple[RankWork, ...]] = {}
        """By bucket of sessions: the ranks it likes best; filled as sessions come."""
        self.index = index
        self.by_bit = {rank.bit: rank for rank in ranks}
        self.version = -1
        """Of the health that the rest was taken from."""
        self.healthy: tuple[RankWork, ...] = ()
        self.twice: tuple[RankWork, ...] = ()
        """Any rotation of the healthy ones is a slice of this."""
        self.groups: tuple[GroupWork, ...] = ()
        """Of the healthy ranks."""
        self.healthy_bits = 0
        self.trial: tuple[RankWork, ...] = ()
        """Those on trial that may take a request now."""

    def refresh(self, health: Health) -> None:
        trial = []
        for rank in self.ranks:
            url = rank.candidate.base_url
            rank.healthy = health.state(url) is RankState.HEALTHY
            if not rank.healthy and health.usable(url):
                trial.append(rank)
        self.trial = tuple(trial)
        self.healthy = tuple([rank for rank in self.ranks if rank.healthy])
        self.twice = self.healthy + self.healthy
        self.groups = tuple({rank.group for rank in self.healthy})
        self.healthy_bits = sum([rank.bit for rank in self.healthy])
        self.version = health.version

    def bound(self, balance: float, slack_requests: float) -> float:
        """Up to so many requests a healthy rank may take one more for the sake of affinity."""
        healthy = self.healthy
        in_flight = self.in_flight
        if len(healthy) != len(self.ranks):
            in_flight = sum([rank.in_flight for rank in healthy])
        return balance * in_flight / len(healthy) + slack_requests

    def least_loaded(self, turn: int, some_full: bool) -> RankWork | None:
        """Of the healthy ranks, None when all are full; `turn` rotates ties."""
        count = len(self.healthy)
        first = turn % count
        ranks: Sequence[RankWork] = self.twice[first : first + count]
        if not some_full:
            return least_loaded(ranks, self.groups)
        ranks = [rank for rank in ranks if not rank.group.full]
        if not ranks:
            return None
        return least_loaded(ranks, [group for group in self.groups if not group.full])


def least_loaded(ranks: Sequence[RankWork], groups: Collection[GroupWork]) -> RankWork:
    """The first of the least loaded ranks; `groups` are theirs."""
    least = min(map(_in_flight, ranks))
    lowest = min([group.pressure for group in groups])
    best: RankWork | None = None
    group: GroupWork | None = None
    pressure = 0.0
    for rank in ranks:
        if rank.in_flight == least and rank.group is not group:
            other = rank.group.pressure
            if other <= lowest:
                return rank  # the common case: no need to look at all ranks
            group = rank.group
            if best is None or other < pressure:
                best, pressure = rank, other
    assert best is not None
    return best


class Sent:
    """One request that was sent to a candidate; from `Router.begin` to `Router.end`."""

    __slots__ = ("era", "rank")

    def __init__(self, rank: RankWork, era: int) -> None:
        self.rank = rank
        self.era = era

    @property
    def candidate(self) -> Candidate:
        return self.rank.candidate
