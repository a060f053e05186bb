"""The fleet as this worker sees it, with the counts of what it has sent where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from expertmesh.core.domain.fleet import Fleet, Group, GroupState, ServedModel
from expertmesh.core.routing.policy import (
    Attempt,
    Candidate,
    Load,
    RoutingConfig,
    candidates_by_model,
    choose,
)


@dataclass(slots=True)
class GroupCount:
    model: str
    pool: str
    in_flight: int = 0
    tokens_in_flight: int = 0
    requests: int = 0
    errors: int = 0


class FleetView:
    def __init__(self, config: RoutingConfig, now_s: Callable[[], float]) -> None:
        """`now_s` is a monotonic clock."""
        self._config: Final = config
        self._now_s: Final = now_s
        self._candidates: dict[str, tuple[Candidate, ...]] = {}
        self._rank_in_flight: dict[str, int] = {}
        self._group_in_flight: dict[str, int] = {}
        self._cooling_until_s: dict[str, float] = {}
        self._load: Final = Load(self._rank_in_flight, self._group_in_flight, self._cooling_until_s)
        self._turn = 0
        self.fleet: Fleet | None = None
        self.models: dict[str, ServedModel] = {}
        self.lost: frozenset[str] = frozenset()
        """Names of groups whose open requests will hardly be answered."""
        self.groups: Final[dict[str, GroupCount]] = {}
        self.arrivals: Final[dict[str, int]] = {}
        """Requests accepted since the start, by model."""

    def apply(self, fleet: Fleet) -> bool:
        """False when nothing has changed. Not decided by the version, which starts anew with a
        controller that lost its state."""
        if fleet == self.fleet:
            return False
        self.fleet = fleet
        self.models = {model.name: model for model in fleet.models}
        self._candidates = candidates_by_model(fleet)
        self.lost = frozenset(g.name for g in fleet.groups if g.state is GroupState.LOST)
        for group in fleet.groups:
            self.groups.setdefault(group.name, GroupCount(group.model, group.pool))
        self._forget_gone(fleet)
        return True

    def is_ready(self, model: str) -> bool:
        return bool(self._candidates.get(model))

    def groups_of(self, model: str) -> tuple[Group, ...]:
        groups = self.fleet.groups if self.fleet is not None else ()
        return tuple(group for group in groups if group.model == model)

    def choose(self, model: str, failed: Sequence[Attempt]) -> Candidate | None:
        self._turn += 1
        return choose(
            self._config,
            self._candidates.get(model, ()),
            self._load,
            failed,
            self._turn,
            self._now_s(),
        )

    def arrived(self, model: str) -> None:
        self.arrivals[model] = self.arrivals.get(model, 0) + 1

    def begin(self, candidate: Candidate, model: str, tokens: int) -> None:
        ranks, groups = self._rank_in_flight, self._group_in_flight
        ranks[candidate.base_url] = ranks.get(candidate.base_url, 0) + 1
        groups[candidate.group] = groups.get(candidate.group, 0) + 1
        count = self.groups.get(candidate.group)
        if count is None:
            count = self.groups[candidate.group] = GroupCount(model, candidate.pool)
        count.in_flight += 1
        count.tokens_in_flight += tokens
        count.requests += 1

    def end(self, candidate: Candidate, tokens: int, failed: bool) -> None:
        """Once for each `begin`."""
        _subtract(self._rank_in_flight, candidate.base_url)
        _subtract(self._group_in_flight, candidate.group)
        count = self.groups[candidate.group]
        count.in_flight -= 1
        count.tokens_in_flight -= tokens
        if failed:
            count.errors += 1
            self._cooling_until_s[candidate.group] = self._now_s() + self._config.cooldown_s

    def _forget_gone(self, fleet: Fleet) -> None:
        """Names of groups grow without end; what has left the fleet and is idle is dropped."""
        names = {group.name for group in fleet.groups}
        for name in [n for n, count in self.groups.items() if n not in names]:
            if self.groups[name].in_flight == 0:
                del self.groups[name]
        for name in [n for n in self._cooling_until_s if n not in names]:
            del self._cooling_until_s[name]


def _subtract(counts: dict[str, int], name: str) -> None:
    left = counts[name] - 1
    if left:
        counts[name] = left
    else:
        del counts[name]
