"""Where a request may go: a rank of a ready group, or an external provider."""

from dataclasses import dataclass

from expertmesh.core.domain.fleet import ExternalRoute, Fleet, GroupState, ServedModel


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rank or one external provider that may be chosen."""

    group: str
    """Of an external provider: the name of its pool."""
    pool: str
    rank: int
    base_url: str
    """Append `/v1/...`."""
    group_ranks: int
    """Number of ranks of its group."""
    external: ExternalRoute | None = None
    """Set for an external provider: says which key and which model name the request needs."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that has been tried for this request and failed."""

    candidate: Candidate
    connection_failed: bool
    """No answer came over the connection: another rank of the group may still be sound. Any other
    failure is the whole group's, since its ranks step together."""


def candidates_by_model(fleet: Fleet) -> dict[str, tuple[Candidate, ...]]:
    """All ranks that may get requests, for every model of the fleet."""
    table: dict[str, list[Candidate]] = {model.name: [] for model in fleet.models}
    for group in fleet.groups:
        if group.state is GroupState.READY and group.model in table:
            table[group.model].extend(
                Candidate(group.name, group.pool, rank.index, rank.base_url, len(group.ranks))
                for rank in group.ranks
            )
    return {model: tuple(candidates) for model, candidates in table.items()}


def external_candidates(model: ServedModel) -> tuple[Candidate, ...]:
    """The external providers that the model's manifest allows, in its order."""
    return tuple(
        Candidate(route.pool, route.pool, 0, route.base_url, 1, route) for route in model.external
    )
