"""Ray Serve in memory, under a simulated clock.

It stands in for Ray's dashboard (applications, nodes, placement groups) and for the ranks' HTTP
ports, and behaves like the real ones where the controller can tell the difference:
* a PUT returns at once; the application is built, its gang waits for a placement group with room on
  the pool's live nodes, its replicas start together and take a while;
* an application missing from a PUT is deleted: its ranks answer for a while longer, then the
  application and its placement group disappear;
* a changed spec under a known name restarts the gang;
* a killed rank stops answering at once, and Serve notices later and restarts the whole gang: all
  members are stopped, the placement group is freed and made anew;
* a dead node stops answering at once, and Ray says so later;
* the dashboard can be down while everything else runs on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from expertmesh.clients.ray_serve import Application, ApplicationStatus, RayNode, Replica
from expertmesh.core.domain.fleet import GroupSpec, RankInfo
from expertmesh.errors import UpstreamUnavailable

BUILD_S = 2.0
START_S = 8.0
DELETE_S = 4.0
NOTICE_S = 26.0
"""Until Serve notices a dead engine."""
NODE_DEATH_S = 10.0
"""Until Ray declares a node dead that stopped answering."""


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class RankLoad:
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Of rank 0; each further rank has 0.1 more."""
    prompt_tokens: int = 0
    """Computed since its start, by each rank."""
    output_tokens: int = 0


@dataclass
class Node:
    node_id: str
    pool: str
    died_at_s: float | None = None


@dataclass
class Member:
    node: Node
    pid: int
    killed_at_s: float | None = None


@dataclass
class App:
    spec: GroupSpec
    asked_at_s: float
    members: list[Member] = field(default_factory=list)
    """Placed, so that the placement group exists."""
    placed_at_s: float = 0.0
    stopping_until_s: float | None = None
    deleted_at_s: float | None = None
    failed: bool = False
    restarts: int = 0


class FakeServe:
    def __init__(self, clock: Clock, pools: dict[str, int]) -> None:
        """`pools`: nodes of one worker each."""
        self._clock = clock
        self._pids = iter(range(100, 1_000_000))
        self.nodes_by_id = {
            f"{pool}-{index}": Node(f"{pool}-{index}", pool)
            for pool, count in pools.items()
            for index in range(count)
        }
        self.apps: dict[str, App] = {}
        self.is_down = False
        self.refuses_puts = False
        self.failing_pools: set[str] = set()
        self.puts: list[tuple[str, ...]] = []
        self.strangers: dict[str, ApplicationStatus] = {}
        self.busy: dict[str, RankLoad] = {}
        """By group: what each of its ranks does."""
        self.notices: dict[str, float] = {}
        """By node id: when its provider will take it, as announced."""
        self.deaf_to_probes: set[int] = set()
        """Ranks, by index, that are too busy to answer."""

    # As the controller sees it

    async def applications(self) -> tuple[Application, ...]:
        self._answer()
        ours = [self._application(name, app) for name, app in sorted(self.apps.items())]
        others = [
            Application(name, status, "", None, (), ()) for name, status in self.strangers.items()
        ]
        return (*ours, *others)

    async def put(self, specs: tuple[GroupSpec, ...]) -> None:
        self._answer()
        if self.refuses_puts:
            raise UpstreamUnavailable("PUT: Ray answered 500")
        self.puts.append(tuple(spec.name for spec in specs))
        wanted = {spec.name: spec for spec in specs}
        self.strangers.clear()
        for name, app in self.apps.items():
            if name not in wanted and app.deleted_at_s is None:
                app.deleted_at_s = self._clock()
        for name, spec in wanted.items():
            app = self.apps.get(name)
            if app is None:
                self.apps[name] = App(spec, self._clock())
            elif app.spec != spec:
                app.spec = spec
                self._restart(app)

    async def nodes(self) -> tuple[RayNode, ...]:
        self._answer()
        return tuple(
            RayNode(node.node_id, f"10.0.0.{index}", not self._is_known_dead(node), node.pool, 1.0)
            for index, node in enumerate(self.nodes_by_id.values())
        )

    async def placement_group_names(self) -> frozenset[str]:
        self._answer()
        return frozenset(
            f"SERVE_GANG::{name}_DPServer_0_{app.restarts}"
            for name, app in self.apps.items()
            if app.members or app.deleted_at_s is None
        )

    async def read(self) -> dict[str, float]:
        """The provider's notices, which do not come from Ray."""
        return dict(self.notices)

    async def info(self, base_url: str) -> RankInfo | None:
        """The ranks' own ports: they do not care whether the dashboard is up."""
        self._pass_time()
        for name, app in self.apps.items():
            for index, member in enumerate(app.members):
                if index in self.deaf_to_probes:
                    continue
                if base_url == _url(name, member) and self._answers(app, member):
                    load = self.busy.get(name, RankLoad())
                    return RankInfo(
                        group=name,
                        model=app.spec.model,
                        rank=index,
                        world_size=len(app.members),
                        running=load.running,
                        waiting=load.waiting,
                        kv_usage=load.kv_usage + 0.1 * index if load.kv_usage else 0.0,
                        kv_tokens=1000,
                        max_running=8,
                        started_at_s=app.placed_at_s,
                        uncached_prompt_tokens_total=load.prompt_tokens,
                        output_tokens_total=load.output_tokens,
                    )
        return None

    # What a test does to it

    def kill_rank(self, group: str, index: int) -> None:
        self.apps[group].members[index].killed_at_s = self._clock()

    def kill_node(self, node_id: str) -> None:
        self.nodes_by_id[node_id].died_at_s = self._clock()

    def nodes_of(self, group: str) -> list[str]:
        return [member.node.node_id for member in self.apps[group].members]

    def running(self) -> list[str]:
        self._pass_time()
        return [
            name
            for name, app in sorted(self.apps.items())
            if app.deleted_at_s is None
            and app.members
            and all(self._answers(app, member) for member in app.members)
        ]

    def forget_everything(self) -> None:
        """The whole Ray cluster was started anew."""
        self.apps.clear()

    # Time

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("GET: no answer")
        self._pass_time()

    def _pass_time(self) -> None:
        now_s = self._clock()
        for name, app in list(self.apps.items()):
            if app.deleted_at_s is not None:
                if now_s - app.deleted_at_s >= DELETE_S:
                    del self.apps[name]
                continue
            if app.stopping_until_s is not None and now_s >= app.stopping_until_s:
                app.members, app.stopping_until_s = [], None
            if app.members and app.stopping_until_s is None and self._is_noticed(app):
                self._restart(app)
            if not app.members and now_s - app.asked_at_s >= BUILD_S and not app.failed:
                self._place(app)
            if app.members and app.spec.pool in self.failing_pools and self._is_started(app):
                app.failed = True

    def _restart(self, app: App) -> None:
        app.restarts += 1
        app.stopping_until_s = self._clock() + 2.0

    def _is_noticed(self, app: App) -> bool:
        now_s = self._clock()
        return any(
            self._is_known_dead(member.node)
            or (member.killed_at_s is not None and now_s - member.killed_at_s >= NOTICE_S)
            for member in app.members
        )

    def _is_known_dead(self, node: Node) -> bool:
        return node.died_at_s is not None and self._clock() - node.died_at_s >= NODE_DEATH_S

    def _place(self, app: App) -> None:
        taken = {member.node.node_id for other in self.apps.values() for member in other.members}
        free = [
            node
            for node in self.nodes_by_id.values()
            if node.pool == app.spec.pool
            and node.node_id not in taken
            and not self._is_known_dead(node)
        ]
        world = app.spec.parallelism.data
        if len(free) >= world:
            app.members = [Member(node, next(self._pids)) for node in free[:world]]
            app.placed_at_s = self._clock()

    def _is_started(self, app: App) -> bool:
        return self._clock() - app.placed_at_s >= START_S

    def _answers(self, app: App, member: Member) -> bool:
        return (
            app.stopping_until_s is None
            and not app.failed
            and self._is_started(app)
            and member.killed_at_s is None
            and member.node.died_at_s is None
        )

    def _application(self, name: str, app: App) -> Application:
        status = ApplicationStatus.RUNNING
        if app.deleted_at_s is not None:
            status = ApplicationStatus.DELETING
        elif app.failed:
            status = ApplicationStatus.DEPLOY_FAILED
        elif app.stopping_until_s is not None or (
            app.restarts and not (app.members and self._is_started(app))
        ):
            status = ApplicationStatus.UNHEALTHY
        elif not (app.members and self._is_started(app)):
            status = ApplicationStatus.DEPLOYING
        return Application(
            name=name,
            status=status,
            message="the engine died while starting" if app.failed else "",
            spec=app.spec,
            replicas=tuple(self._replicas(app)),
            rank_urls=tuple(
                _url(name, member)
                for member in app.members
                if self._is_started(app) and app.stopping_until_s is None and not app.failed
            ),
        )

    def _replicas(self, app: App) -> Iterable[Replica]:
        now_s = self._clock()
        if not app.members:
            if now_s - app.asked_at_s >= BUILD_S and not app.failed:
                for _ in range(app.spec.parallelism.data):
                    yield Replica("STARTING", "", "", None)
            return
        state = "RUNNING" if self._is_started(app) else "STARTING"
        if app.stopping_until_s is not None or app.deleted_at_s is not None:
            state = "STOPPING"
        for member in app.members:
            yield Replica(state, member.node.node_id, "10.0.0.1", member.pid)


def _url(name: str, member: Member) -> str:
    return f"http://{member.node.node_id}:{member.pid}/{name}"
