"""Small fleets for the tests of the router."""

from collections.abc import Iterable

from expertmesh.core.domain.fleet import (
    ExternalRoute,
    ExternalUse,
    Fleet,
    Group,
    GroupLoad,
    GroupState,
    Rank,
    ServedModel,
)
from expertmesh.core.routing.candidate import Attempt, Candidate
from expertmesh.core.routing.router import Router, RoutingConfig
from expertmesh.core.routing.work import Sent


def url(group: str, rank: int) -> str:
    return f"http://{group}/{rank}"


def group(
    name: str, ranks: int = 2, state: GroupState = GroupState.READY, model: str = "m"
) -> Group:
    return Group(
        name, model, f"pool-{name}", state, tuple(Rank(n, url(name, n)) for n in range(ranks))
    )


def route(
    pool: str,
    usd_per_mtok_in: float = 1.0,
    usd_per_mtok_out: float = 1.0,
    use: ExternalUse = ExternalUse.FALLBACK,
    overflow_wait_s: float = 10.0,
) -> ExternalRoute:
    return ExternalRoute(
        pool,
        f"https://{pool}",
        f"{pool}/m",
        "KEY",
        usd_per_mtok_in,
        usd_per_mtok_in,
        usd_per_mtok_out,
        use,
        overflow_wait_s,
    )


def model(name: str = "m", external: tuple[ExternalRoute, ...] = ()) -> ServedModel:
    return ServedModel(name, 4096, 2.0, 1.0, 4.0, 30.0, external=external)


def fleet(
    groups: Iterable[Group],
    loads: dict[str, GroupLoad] | None = None,
    external: tuple[ExternalRoute, ...] = (),
) -> Fleet:
    return Fleet(1, (model(external=external),), tuple(groups), loads or {})


def router(*groups: Group, config: RoutingConfig | None = None) -> Router:
    made = Router(config or RoutingConfig())
    made.apply(fleet(groups))
    return made


def rank_of(made: Router, name: str, rank: int) -> Candidate:
    """As the router knows it."""
    return next(
        member.candidate
        for member in made._tables["m"].ranks
        if (member.candidate.group, member.candidate.rank) == (name, rank)
    )


def send(made: Router, **in_flight: int) -> list[Sent]:
    """By rank, e.g. a0=1."""
    return [
        made.begin(rank_of(made, name[:-1], int(name[-1])))
        for name, count in in_flight.items()
        for _ in range(count)
    ]


def chosen(
    made: Router,
    failed: Iterable[Attempt] = (),
    session: bytes | None = None,
    blocks: tuple[int, ...] = (),
) -> str | None:
    """The choice in short, e.g. `a0`."""
    candidate = made.choose("m", tuple(failed), session, blocks)
    return None if candidate is None else f"{candidate.group}{candidate.rank}"
