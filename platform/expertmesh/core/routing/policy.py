"""Which rank serves a request: the least loaded rank of the model's ready groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertmesh.core.domain.fleet import Fleet, GroupState


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    max_attempts: int = 2
    """A request that crashes an engine must not visit the whole fleet."""
    cooldown_s: float = 5.0
    """A group that failed is avoided for so long while another one is ready: without this, a group
    that refuses at once always looks least loaded and draws all requests."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rank that may be chosen."""

    group: str
    pool: str
    rank: int
    base_url: str
    group_ranks: int
    """Number of ranks of its group."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the caller has sent and not yet had answered, and when groups failed; only read here."""

    rank_in_flight: Mapping[str, int]
    """By base_url; a missing rank has none."""
    group_in_flight: Mapping[str, int]
    cooling_until_s: Mapping[str, float]
    """By group."""


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


def choose(
    config: RoutingConfig,
    candidates: Sequence[Candidate],
    load: Load,
    failed: Sequence[Attempt],
    turn: int,
    now_s: float,
) -> Candidate | None:
    """The candidate for the next attempt, or None when no attempt is left or nothing can take it.

    `turn` rotates ties; the caller adds one with every request. A second attempt goes to another
    group, or after a connection failure, when there is no other, to another rank of the same one.
    """
    if len(failed) >= config.max_attempts:
        return None
    if not failed:
        return _least_loaded(candidates, load, turn, now_s)
    groups = {attempt.candidate.group for attempt in failed}
    others = [candidate for candidate in candidates if candidate.group not in groups]
    if others or not all(attempt.connection_failed for attempt in failed):
        return _least_loaded(others, load, turn, now_s)
    ranks = {attempt.candidate.base_url for attempt in failed}
    siblings = [candidate for candidate in candidates if candidate.base_url not in ranks]
    return _least_loaded(siblings, load, turn, now_s)


def _least_loaded(
    candidates: Sequence[Candidate], load: Load, turn: int, now_s: float
) -> Candidate | None:
    count = len(candidates)
    if count <= 1:
        return candidates[0] if count else None
    rank_in_flight = load.rank_in_flight
    cooling = load.cooling_until_s
    start = turn % count
    best: Candidate | None = None
    best_key = (True, 0, 0.0)
    for offset in range(start, start + count):
        candidate = candidates[offset - count if offset >= count else offset]
        group = candidate.group
        # Ties between idle ranks go to the group with less work per rank: its ranks step together.
        key = (
            group in cooling and cooling[group] > now_s,
            rank_in_flight.get(candidate.base_url, 0),
            load.group_in_flight.get(group, 0) / candidate.group_ranks,
        )
        if best is None or key < best_key:
            best, best_key = candidate, key
    return best
