"""Look at Serve, the ranks and the gateways; what cannot be seen is said to be unknown."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import aiohttp
import msgspec

from expertmesh.clients.ray_serve import Application, RayNode, Replica
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Rank, RankInfo
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.scaling.contract import (
    ApplicationSeen,
    GroupRecord,
    GroupSeen,
    ModelState,
    Observation,
    PoolSeen,
    RankSeen,
    ReplicaSeen,
    ScalingConfig,
    workers_of,
)
from expertmesh.core.scaling.demand import GatewaySeen, GroupDoing
from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_SERVE_TIMEOUT_S = 5.0
"""One look must not hold up the next ones when the dashboard hangs."""
_PROBES_AT_ONCE = 128
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINE_LIMIT = 300
_GANG_PREFIX = "SERVE_GANG::"


class ServeView(Protocol):
    """What is read from Ray; raises UpstreamUnavailable."""

    async def applications(self) -> tuple[Application, ...]: ...

    async def nodes(self) -> tuple[RayNode, ...]: ...

    async def placement_group_names(self) -> frozenset[str]: ...


class RankProbe(Protocol):
    async def info(self, base_url: str) -> RankInfo | None:
        """None when the rank does not answer as a rank; never raises."""
        ...


class SpotNotices(Protocol):
    """What providers have announced about nodes that they will take away."""

    async def read(self) -> Mapping[str, float]:
        """By a node's id in Ray, its address or its name: the Unix time at which it is taken.
        Raises UpstreamUnavailable."""
        ...


class HttpRankProbe:
    def __init__(
        self, http: aiohttp.ClientSession, mesh_token: str, timeout_s: float = 3.0
    ) -> None:
        self._http = http
        self._headers = {"X-EM-Mesh-Token": mesh_token}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def info(self, base_url: str) -> RankInfo | None:
        try:
            async with self._http.get(
                f"{base_url}/em/info", headers=self._headers, timeout=self._timeout
            ) as response:
                if response.status != 200:
                    return None
                return msgspec.json.decode(await response.read(), type=RankInfo)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Snapshot:
    applications: tuple[Application, ...] | None
    nodes: tuple[RayNode, ...] | None
    placement_groups: frozenset[str] | None
    ranks: Mapping[str, RankInfo | None]
    """By base URL; only the addresses that were probed."""
    failures: Mapping[str, int]
    """By base URL: probes in a row without an answer."""
    answered_at_s: Mapping[str, float] = field(default_factory=dict)
    """By base URL: when the answer came, for those that answered."""
    notices: Mapping[str, float] = field(default_factory=dict)
    """See `SpotNotices`; the last ones that could be read."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """What could not be seen, and why."""


class Observer:
    def __init__(
        self,
        serve: ServeView,
        probe: RankProbe,
        notices: SpotNotices | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._serve = serve
        self._probe = probe
        self._notices = notices
        self._now_s = now_s
        self._noticed: Mapping[str, float] = {}
        self._failures: dict[str, int] = {}
        self._probes = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def look(self, records: Iterable[GroupRecord]) -> Snapshot:
        records = tuple(records)
        # Placement groups matter only for groups that are on their way out.
        leaving = any(record.removed_at_s is not None for record in records)
        known = {rank.base_url for record in records for rank in _probed_ranks(record)}
        problems: dict[str, str] = {}
        answered_at_s: dict[str, float] = {}
        applications, nodes, placement_groups, noticed, ranks = await asyncio.gather(
            self._ask("applications", self._serve.applications(), problems),
            self._ask("nodes", self._serve.nodes(), problems),
            self._ask("placement groups", self._serve.placement_group_names(), problems)
            if leaving
            else _nothing(),
            self._ask("spot notices", self._notices.read(), problems, "their source")
            if self._notices is not None
            else _nothing(),
            self._probe_all(known, answered_at_s),
        )
        if noticed is not None:
            self._noticed = noticed
        listed = {url for application in applications or () for url in application.rank_urls}
        ranks |= await self._probe_all(listed - known, answered_at_s)
        self._failures = {
            url: 0 if info is not None else self._failures.get(url, 0) + 1
            for url, info in ranks.items()
        }
        return Snapshot(
            applications=applications,
            nodes=nodes,
            placement_groups=placement_groups,
            ranks=ranks,
            failures=dict(self._failures),
            answered_at_s=answered_at_s,
            notices=self._noticed,
            problems=problems,
        )

    async def _ask(
        self,
        what: str,
        question: Awaitable[_Answer],
        problems: dict[str, str],
        who: str = "Ray's dashboard",
    ) -> _Answer | None:
        try:
            async with asyncio.timeout(_SERVE_TIMEOUT_S):
                return await question
        except UpstreamUnavailable as error:
            problems[what] = str(error)
        except TimeoutError:
            problems[what] = f"{who} did not answer within {_SERVE_TIMEOUT_S:g} s"
        except Exception as error:
            _log.exception("cannot read the %s", what)
            problems[what] = f"{type(error).__name__}: {error}"
        return None

    async def _probe_all(
        self, urls: set[str], answered_at_s: dict[str, float]
    ) -> dict[str, RankInfo | None]:
        async def one(url: str) -> RankInfo | None:
            async with self._probes:
                info = await self._probe.info(url)
            if info is not None:
                answered_at_s[url] = self._now_s()
            return info

        ordered = sorted(urls)
        answers = await asyncio.gather(*(one(url) for url in ordered))
        return dict(zip(ordered, answers, strict=True))


async def _nothing() -> None:
    return None


def _probed_ranks(record: GroupRecord) -> tuple[Rank, ...]:
    """A group that should answer at addresses that are known."""
    if record.removed_at_s is not None or record.state is GroupState.STARTING:
        return ()
    return record.ranks


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What one model's decision needs to know beside its own groups."""

    gateways: tuple[GatewaySeen, ...]
    elsewhere: tuple[GroupRecord, ...]
    """Groups of other models."""
    held_since_s: Mapping[str, float]
    first_look: bool
    settled: bool
    doing: Mapping[str, GroupDoing] = field(default_factory=dict)
    """By group; those of which it is known."""


def observation_of(
    config: ScalingConfig, state: ModelState, snapshot: Snapshot, around: Surroundings
) -> Observation:
    records = {record.spec.name: record for record in state.groups}
    applications = {app.name: app for app in snapshot.applications or ()}
    own = sorted(
        {*records}
        | {
            name
            for name, app in applications.items()
            if app.spec is not None and app.spec.model == config.model
        }
    )
    alive = _alive_nodes(snapshot.nodes)
    leaving = _leaving_nodes(snapshot)
    return Observation(
        groups=tuple(
            _group_seen(
                name, records.get(name), applications.get(name), snapshot, alive, leaving, around
            )
            for name in own
        ),
        pools=tuple(
            _pool_seen(pool, snapshot.nodes, around.elsewhere, applications, leaving)
            for pool in config.pools
        ),
        gateways=around.gateways,
        serve_answers=snapshot.applications is not None,
        first_look=around.first_look and snapshot.applications is not None,
        settled=around.settled,
        names_elsewhere=tuple(
            sorted(({*applications} | {record.spec.name for record in around.elsewhere}) - {*own})
        ),
    )


def _group_seen(
    name: str,
    record: GroupRecord | None,
    application: Application | None,
    snapshot: Snapshot,
    alive: frozenset[str] | None,
    leaving: Mapping[str, float],
    around: Surroundings,
) -> GroupSeen:
    urls = set(application.rank_urls) if application else set()
    if record is not None:
        urls.update(rank.base_url for rank in _probed_ranks(record))
    placement_group = None
    if snapshot.placement_groups is not None:
        prefix = f"{_GANG_PREFIX}{name}_"
        placement_group = any(pg.startswith(prefix) for pg in snapshot.placement_groups)
    taken_at_s = _leaving_ranks(record, application, leaving)
    return GroupSeen(
        name=name,
        application=_application_seen(application, alive) if application else None,
        ranks=tuple(
            _rank_seen(name, url, snapshot) for url in sorted(urls) if url in snapshot.ranks
        ),
        placement_group=placement_group,
        spec=_changed_spec(record, application),
        held_since_s=around.held_since_s.get(name) if record is None else None,
        doing=around.doing.get(name),
        leaving_at_s=min(taken_at_s, default=None),
        leaving_workers=len(taken_at_s) * _workers_a_rank(record, application),
    )


def _workers_a_rank(record: GroupRecord | None, application: Application | None) -> int:
    spec = record.spec if record is not None else application.spec if application else None
    return spec.parallelism.tensor if spec is not None else 0


def _changed_spec(record: GroupRecord | None, application: Application | None) -> GroupSpec | None:
    if application is None or (record is not None and record.spec == application.spec):
        return None
    return application.spec


def _application_seen(application: Application, alive: frozenset[str] | None) -> ApplicationSeen:
    return ApplicationSeen(
        status=application.status.value,
        message=condensed(application.message),
        replicas=tuple(_replica_seen(replica, alive) for replica in application.replicas),
    )


def condensed(message: str) -> str:
    """Serve's messages hold whole tracebacks in colour: the first line and the last say it."""
    lines = [line.strip() for line in _COLOUR.sub("", message).splitlines() if line.strip()]
    shown = lines if len(lines) <= 2 else [lines[0], lines[-1]]
    return " ".join(line[:_LINE_LIMIT] for line in shown)


def _replica_seen(replica: Replica, alive: frozenset[str] | None) -> ReplicaSeen:
    placed = bool(replica.node_id)
    return ReplicaSeen(
        state=replica.state,
        member=f"{replica.node_id}/{replica.pid}" if placed and replica.pid else None,
        node_alive=replica.node_id in alive if placed and alive is not None else None,
    )


def _rank_seen(group: str, url: str, snapshot: Snapshot) -> RankSeen:
    info = snapshot.ranks[url]
    failures = snapshot.failures.get(url, 0)
    if info is None or info.group != group:
        return RankSeen(url, failures)
    return RankSeen(url, failures, index=info.rank, world_size=info.world_size)


def _alive_nodes(nodes: tuple[RayNode, ...] | None) -> frozenset[str] | None:
    return None if nodes is None else frozenset(node.node_id for node in nodes if node.alive)


def _leaving_nodes(snapshot: Snapshot) -> Mapping[str, float]:
    """By node id and by all that notices name: the Unix time at which the node is taken."""
    notices = {key: at_s for key, at_s in snapshot.notices.items() if key}
    leaving = dict(notices)
    for node in (snapshot.nodes or ()) if notices else ():
        times = [notices[key] for key in (node.node_id, node.ip, node.name) if key in notices]
        if times:
            leaving[node.node_id] = min(times)
    return leaving


def _leaving_ranks(
    record: GroupRecord | None, application: Application | None, leaving: Mapping[str, float]
) -> list[float]:
    """The times, one for each rank on a node that will be taken; while Serve is silent, the ranks
    are where they were when the group was last ready."""
    if not leaving:
        return []
    if application is not None:
        places = [(replica.node_id, replica.node_ip) for replica in application.replicas]
    else:
        places = [(member.partition("/")[0], "") for member in record.members] if record else []
    return [
        leaving[node_id] if node_id in leaving else leaving[node_ip]
        for node_id, node_ip in places
        if node_id in leaving or node_ip in leaving
    ]


def _pool_seen(
    pool: Pool,
    nodes: tuple[RayNode, ...] | None,
    elsewhere: tuple[GroupRecord, ...],
    applications: Mapping[str, Application],
    leaving: Mapping[str, float],
) -> PoolSeen:
    """A node that will be taken is no room, so what runs there takes none either."""

    def workers(record: GroupRecord) -> int:
        app = applications.get(record.spec.name)
        leaving_ranks = len(_leaving_ranks(record, app, leaving))
        parallelism = record.spec.parallelism
        return max(0, workers_of(parallelism) - leaving_ranks * parallelism.tensor)

    here = [record for record in elsewhere if record.spec.pool == pool.name]
    live = None
    if nodes is not None:
        live = sum(
            int(min(node.workers_total, pool.workers_per_node))
            for node in nodes
            if node.alive and node.pool == pool.name and node.node_id not in leaving
        )
    return PoolSeen(
        name=pool.name,
        live_workers=live,
        used_elsewhere=sum(workers(record) for record in here),
        staying_elsewhere=sum(workers(record) for record in here if record.removed_at_s is None),
    )
