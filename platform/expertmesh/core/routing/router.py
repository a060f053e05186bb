"""Which rank serves a request: by session, by prompt prefix, or the least loaded one.

Affinity holds with bounded loads only (Mirrokni et al., "Consistent Hashing with Bounded Loads",
2018): a rank that has clearly more than the mean takes nothing for the sake of its cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from expertmesh.core.domain.fleet import Fleet, GroupLoad, ServedModel
from expertmesh.core.routing.candidate import (
    Attempt,
    Candidate,
    candidates_by_model,
    external_candidates,
)
from expertmesh.core.routing.external import (
    NO_PROVIDER,
    ExternalAsk,
    ExternalChoice,
    ExternalConfig,
    choose_external,
)
from expertmesh.core.routing.health import Evidence, Health, HealthConfig, RankState
from expertmesh.core.routing.prefix import PrefixIndex
from expertmesh.core.routing.session import bucket_of, rank_order, rank_seed
from expertmesh.core.routing.work import GroupWork, RankTable, RankWork, Sent, least_loaded

_PREFERRED_RANKS = 8
"""When so many are over the bound, the session goes to the least loaded rank."""


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    max_attempts: int = 2
    """A request that crashes an engine must not visit the whole fleet."""
    balance: float = 1.25
    """Affinity leads to a rank only while it has at most so many times the mean, plus the slack."""
    slack_requests: float = 1.0
    """Keeps affinity when there is so little traffic that one request is far above the mean."""
    load_weight: float = 0.5
    """What a load at the bound costs, as a share of a prompt that must be computed anew."""
    prefix_blocks: int = 65_536
    """Blocks of prompts that are remembered for each model."""
    health: HealthConfig = field(default_factory=HealthConfig)
    external: ExternalConfig = field(default_factory=ExternalConfig)


class Router:
    """One per worker. Every `begin` is followed by one `end`. Times are monotonic."""

    def __init__(self, config: RoutingConfig, salt: str = "") -> None:
        """`salt`: the worker's name, see `Health`."""
        self._config: Final = config
        self.health: Final = Health(config.health, salt)
        self._tables: dict[str, RankTable] = {}
        self._ranks: dict[str, RankWork] = {}
        """Of the whole fleet, by base_url, those of groups that are not ready included."""
        self._groups: dict[str, GroupWork] = {}
        self._full: set[str] = set()
        self._indexes: dict[str, PrefixIndex] = {}
        self._external: dict[str, tuple[Candidate, ...]] = {}
        self._providers: dict[str, RankWork] = {}
        """By pool."""
        self._models: dict[str, ServedModel] = {}
        self._fleet = Fleet(0)
        self._turn = 0

    def apply(self, fleet: Fleet) -> None:
        """Groups, providers and loads as the controller reports them."""
        if fleet.groups != self._fleet.groups or fleet.models != self._fleet.models:
            self._build(fleet)
        self._fleet = fleet
        loads: Mapping[str, GroupLoad] = fleet.loads
        for name, group in self._groups.items():
            group.report(loads.get(name))

    def is_ready(self, model: str) -> bool:
        return model in self._tables

    def wants_affinity(self, model: str) -> bool:
        """False when there is nothing to choose between: session and blocks need not be found."""
        table = self._tables.get(model)
        return table is not None and table.only is None

    def set_full(self, group: str, full: bool) -> None:
        """A full group gets nothing new; unknown names are ignored."""
        work = self._groups.get(group)
        if work is not None:
            work.full = full
            if full:
                self._full.add(group)
            else:
                self._full.discard(group)

    def choose(
        self,
        model: str,
        failed: Sequence[Attempt] = (),
        session: bytes | None = None,
        blocks: Sequence[int] = (),
    ) -> Candidate | None:
        """The rank for the next attempt, or None when no attempt is left or nothing can take it:
        what is sound is full, or nothing is sound. Then it is worth to wait a little, as ejected
        ranks are probed.

        `blocks` (see `prefix_blocks`) count only where no rank that the session prefers may take
        it. A second attempt goes to another group, or after a connection failure, when there is no
        other, to another rank of the same one.
        """
        table = self._tables.get(model)
        if table is None:
            return None
        if failed:
            return self._choose_again(table, failed)
        if table.only is not None and self.health.all_healthy:
            return None if table.ranks[0].group.full else table.only
        if table.version != self.health.version:
            table.refresh(self.health)
        if table.trial:
            trial = [rank for rank in table.trial if not rank.group.full]
            if trial:
                return self._rotated(trial).candidate  # or it might never return
        if not table.healthy:
            return self._on_trial(table.ranks)
        config = self._config
        if session is not None:
            bound = table.bound(config.balance, config.slack_requests)
            for rank in table.orders.get(bucket_of(session)) or self._order(table, session):
                if rank.healthy and rank.in_flight <= bound and not rank.group.full:
                    return rank.candidate
        self._turn += 1
        least = table.least_loaded(self._turn, bool(self._full))
        if least is None:
            return None
        if blocks:
            return self._by_prefix(table, least, blocks).candidate
        return least.candidate

    def external_candidates(self, model: str) -> tuple[Candidate, ...]:
        return self._external.get(model, ())

    def choose_external(
        self, model: str, ask: ExternalAsk, failed: Sequence[Attempt] = ()
    ) -> ExternalChoice:
        """Whether the next attempt goes to an external provider."""
        candidates = self._external.get(model)
        if not candidates:
            return NO_PROVIDER
        if failed:
            tried = {attempt.candidate.base_url for attempt in failed}
            candidates = tuple(c for c in candidates if c.base_url not in tried)
        return choose_external(
            self._config.external,
            self._models[model],
            candidates,
            ask,
            lambda candidate: self.health.usable(candidate.base_url),
            lambda candidate: self._providers[candidate.pool].in_flight,
        )

    def begin(self, candidate: Candidate) -> Sent:
        """A request goes to the candidate now."""
        if candidate.external is None:
            rank = self._ranks.get(candidate.base_url)
        else:
            rank = self._providers.get(candidate.pool)
        if rank is None or rank.candidate.group != candidate.group:
            rank = RankWork(candidate, GroupWork())  # it has left the fleet
        rank.in_flight += 1
        rank.group.in_flight += 1
        if rank.table is not None:
            rank.table.in_flight += 1
        return Sent(rank, self.health.begin(candidate.base_url))

    def answered(self, sent: Sent, now_s: float) -> None:
        """A good answer has begun: the first event, a whole body, or a refusal of the request."""
        if not self.health.all_healthy:
            self.health.answered(sent.rank.candidate.base_url, sent.era, now_s)

    def end(
        self, sent: Sent, now_s: float, evidence: Evidence | None = None, retried: bool = False
    ) -> None:
        """The request is over. `evidence`: the rank failed it; None also when the client left.

        `retried`: another candidate has failed the same request. When the answer of this one is no
        better, the request is to blame, and must not eject one group after the other.
        """
        rank = sent.rank
        rank.in_flight -= 1
        rank.group.in_flight -= 1
        if rank.table is not None:
            rank.table.in_flight -= 1
        if evidence is None and self.health.all_healthy:
            return
        candidate = rank.candidate
        self.health.end(candidate.base_url, sent.era)
        if evidence is not None and not (
            retried and evidence in (Evidence.SERVER_ERROR, Evidence.BAD_ANSWER)
        ):
            self.health.failed(candidate.group, candidate.base_url, sent.era, evidence, now_s)

    def due_probes(self, now_s: float) -> tuple[Candidate, ...]:
        """What to probe now; report `health.probe_ok` or `health.probe_failed` of its base_url."""
        due = self.health.due_probes(now_s)
        return tuple(candidate for url in due if (candidate := self._candidate(url)) is not None)

    def _choose_again(self, table: RankTable, failed: Sequence[Attempt]) -> Candidate | None:
        if len(failed) >= self._config.max_attempts:
            return None
        groups = {attempt.candidate.group for attempt in failed}
        others = [rank for rank in table.ranks if rank.candidate.group not in groups]
        siblings: list[RankWork] = []
        if all(attempt.connection_failed for attempt in failed):
            urls = {attempt.candidate.base_url for attempt in failed}
            siblings = [
                rank
                for rank in table.ranks
                if rank.candidate.group in groups and rank.candidate.base_url not in urls
            ]
        if table.version != self.health.version:
            table.refresh(self.health)
        trial = table.trial
        for ranks in (
            [rank for rank in others if rank.healthy],
            [rank for rank in siblings if rank.healthy],
            [rank for rank in others if rank in trial],
            [rank for rank in siblings if rank in trial],
        ):
            room = [rank for rank in ranks if not rank.group.full]
            if room:
                return self._rotated(room).candidate
        return self._on_trial(others) or self._on_trial(siblings)

    def _order(self, table: RankTable, session: bytes) -> tuple[RankWork, ...]:
        bucket = bucket_of(session)
        order = table.orders.get(bucket)
        if order is None:
            ranks = table.ranks
            best = rank_order([rank.seed for rank in ranks], bucket, _PREFERRED_RANKS)
            order = table.orders[bucket] = tuple(ranks[place] for place in best)
        return order

    def _by_prefix(self, table: RankTable, least: RankWork, blocks: Sequence[int]) -> RankWork:
        """The rank with the best of: share of the prompt that it has seen, less its load. Without
        a match the least loaded one: the one that has seen least would draw every new prompt."""
        best = least
        matches = table.index.matches(blocks, table.healthy_bits)
        if matches:
            bound = table.bound(self._config.balance, self._config.slack_requests)
            weight = self._config.load_weight
            best_score = -weight * (least.in_flight / bound + least.group.queues)
            for depth, mask in matches:
                share = depth / len(blocks)
                if share <= best_score:
                    break  # even when idle
                while mask:
                    bit = mask & -mask
                    mask ^= bit
                    rank = table.by_bit[bit]
                    if rank.in_flight <= bound and not rank.group.full:
                        score = share - weight * (rank.in_flight / bound + rank.group.queues)
                        if score > best_score or (score == best_score and rank is least):
                            best, best_score = rank, score
        table.index.record(blocks, best.bit)
        return best

    def _rotated(self, ranks: Sequence[RankWork]) -> RankWork:
        self._turn += 1
        first = self._turn % len(ranks)
        return least_loaded((*ranks[first:], *ranks[:first]), {rank.group for rank in ranks})

    def _on_trial(self, ranks: Sequence[RankWork]) -> Candidate | None:
        """Where nothing is healthy, a rank whose probe was good takes more than the one request
        of its trial: that one may last for minutes."""
        state = self.health.state
        found = [
            rank
            for rank in ranks
            if not rank.group.full and state(rank.candidate.base_url) is RankState.TRIAL
        ]
        return self._rotated(found).candidate if found else None

    def _candidate(self, base_url: str) -> Candidate | None:
        rank = self._ranks.get(base_url)
        if rank is not None:
            return rank.candidate
        for provider in self._providers.values():
            if provider.candidate.base_url == base_url:
                return provider.candidate
        return None

    def _build(self, fleet: Fleet) -> None:
        """Ranks keep their counts; a base_url that belongs to another group now starts anew."""
        groups = {group.name: self._groups.get(group.name) or GroupWork() for group in fleet.groups}
        ranks: dict[str, RankWork] = {}
        for group in fleet.groups:
            groups[group.name].ranks = max(1, len(group.ranks))
            for place in group.ranks:
                rank = self._ranks.get(place.base_url)
                if rank is not None and rank.candidate.group == group.name:
                    ranks[place.base_url] = rank
        tables: dict[str, RankTable] = {}
        indexes: dict[str, PrefixIndex] = {}
        for model, candidates in candidates_by_model(fleet).items():
            if not candidates:
                continue
            index = self._indexes.get(model) or PrefixIndex(self._config.prefix_blocks)
            bits = index.keep([candidate.base_url for candidate in candidates])
            members = []
            for candidate in candidates:
                rank = ranks.get(candidate.base_url)
                if rank is None:
                    rank = RankWork(candidate, groups[candidate.group])
                    rank.seed = rank_seed(candidate.base_url)
                    ranks[candidate.base_url] = rank
                rank.candidate = candidate
                rank.bit = bits[candidate.base_url]
                members.append(rank)
            table = RankTable(tuple(members), index)
            for rank in members:
                rank.table = table
            tables[model] = table
            indexes[model] = index
        self._groups, self._ranks = groups, ranks
        self._full = {name for name, group in groups.items() if group.full}
        self._tables, self._indexes = tables, indexes
        self._build_external(fleet)
        self.health.keep(
            {group.name: tuple(rank.base_url for rank in group.ranks) for group in fleet.groups}
            | {name: (p.candidate.base_url,) for name, p in self._providers.items()}
        )

    def _build_external(self, fleet: Fleet) -> None:
        self._models = {model.name: model for model in fleet.models}
        self._external = {model.name: external_candidates(model) for model in fleet.models}
        providers: dict[str, RankWork] = {}
        for candidates in self._external.values():
            for candidate in candidates:
                if candidate.pool not in providers:
                    known = self._providers.get(candidate.pool)
                    providers[candidate.pool] = known or RankWork(candidate, GroupWork())
        self._providers = providers
