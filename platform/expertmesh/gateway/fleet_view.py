"""The fleet as this worker sees it, with the counts of what it has sent where."""

from collections.abc import Callable
from typing import Final

from expertmesh.core.admission.slots import SlotRules, has_room
from expertmesh.core.domain.fleet import Fleet, Group, GroupLoad, GroupState, ServedModel
from expertmesh.core.routing.aliases import models_by_name
from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.external import ExternalAsk, ExternalChoice
from expertmesh.core.routing.health import Evidence, RankState
from expertmesh.core.routing.prefix import prefix_blocks
from expertmesh.core.routing.router import Router
from expertmesh.gateway.call import Call
from expertmesh.gateway.model_count import ModelCount
from expertmesh.gateway.usage import TokenCount

_NO_LOAD: Final = GroupLoad()
_LEAST_PREFIX_BYTES: Final = 2048
"""Some 500 tokens: what is shorter is computed anew before a detour pays."""
_MOST_PREFIX_BYTES: Final = 32 * 1024


class GroupCount:
    __slots__ = (
        "elsewhere",
        "errors",
        "full",
        "in_flight",
        "load",
        "model",
        "pool",
        "ranks",
        "requests",
        "sent_tokens",
        "tokens_in_flight",
        "tpot_count",
        "tpot_s_sum",
        "ttft_count",
        "ttft_s_sum",
    )

    def __init__(self, model: str, pool: str, ranks: int) -> None:
        self.model = model
        self.pool = pool
        self.ranks = ranks
        self.in_flight = 0
        self.tokens_in_flight = 0
        self.requests = 0
        self.errors = 0
        self.ttft_s_sum = 0.0
        self.ttft_count = 0
        self.tpot_s_sum = 0.0
        self.tpot_count = 0
        self.load = _NO_LOAD
        self.elsewhere = 0
        """In flight from other gateways, as of the last exchange."""
        self.sent_tokens = 0
        """Of prompts sent since then."""
        self.full = False


class FleetView:
    def __init__(self, router: Router, rules: SlotRules, now_s: Callable[[], float]) -> None:
        """`now_s` is a monotonic clock."""
        self._router: Final = router
        self._rules: Final = rules
        self._now_s: Final = now_s
        self._reported_in_flight: dict[str, int] = {}
        self._heard_s = now_s()
        self.fleet: Fleet | None = None
        self.models: dict[str, ServedModel] = {}
        """By name and by alias."""
        self.names: tuple[str, ...] = ()
        """Of the models, without aliases."""
        self.lost: frozenset[str] = frozenset()
        """Names of groups whose open requests will hardly be answered."""
        self.groups: Final[dict[str, GroupCount]] = {}
        self.counts: Final[dict[str, ModelCount]] = {}
        """By model."""

    @property
    def age_s(self) -> float:
        """Since the controller last answered, or since the start."""
        return self._now_s() - self._heard_s

    def apply(self, fleet: Fleet) -> bool:
        """False when nothing but loads has changed. Not decided by the version, which starts anew
        with a controller that lost its state."""
        before = self.fleet
        self.fleet = fleet
        self._heard_s = self._now_s()
        self._router.apply(fleet)
        changed = before is None or fleet.groups != before.groups or fleet.models != before.models
        if changed:
            self.models = models_by_name(fleet)
            self.names = tuple(sorted(model.name for model in fleet.models))
            self.lost = frozenset(g.name for g in fleet.groups if g.state is GroupState.LOST)
            for group in fleet.groups:
                if group.name not in self.groups:
                    self.groups[group.name] = GroupCount(group.model, group.pool, len(group.ranks))
                self.groups[group.name].ranks = max(1, len(group.ranks))
            self._forget_gone(fleet)
        for name, count in self.groups.items():
            count.load = fleet.loads.get(name, _NO_LOAD)
            reported = self._reported_in_flight.get(name, 0)
            count.elsewhere = max(0, count.load.in_flight - reported)
            count.sent_tokens = 0
            self._set_full(name, count)
        return changed

    def reported(self) -> dict[str, GroupCount]:
        """The counts that now go into a report."""
        self._reported_in_flight = {n: count.in_flight for n, count in self.groups.items()}
        return self.groups

    def is_ready(self, model: str) -> bool:
        return self._router.is_ready(model)

    def answers(self, model: str) -> bool:
        """A rank of a ready group is not ejected: whoever waits will be served."""
        if not self._router.is_ready(model):
            return False
        health = self._router.health
        return health.all_healthy or any(
            health.state(rank.base_url) is not RankState.EJECTED
            for group in self.groups_of(model)
            if group.state is GroupState.READY
            for rank in group.ranks
        )

    def groups_of(self, model: str) -> tuple[Group, ...]:
        groups = self.fleet.groups if self.fleet is not None else ()
        return tuple(group for group in groups if group.model == model)

    def count_of(self, model: str) -> ModelCount:
        count = self.counts.get(model)
        if count is None:
            count = self.counts[model] = ModelCount()
        return count

    def arrived(self, call: Call) -> None:
        """Within its tenant's limits, whatever becomes of it."""
        if call.endpoint.metered:
            count = self.count_of(call.model.name)
            count.arrivals += 1
            count.arrived_prompt_tokens += call.prompt_guess

    def answered_with(self, call: Call, tokens: TokenCount) -> None:
        """Whole or in part, by the rank or provider that was asked last."""
        count = self.count_of(call.model.name)
        if call.candidate is not None and call.candidate.external is not None:
            count.external_requests += 1
            count.external_prompt_tokens += tokens.prompt
            count.external_output_tokens += tokens.completion
        else:
            count.finished += 1
            count.uncached_prompt_tokens += tokens.prompt - tokens.cached
            count.output_tokens += tokens.completion

    def choose(self, call: Call) -> Candidate | None:
        """A sound rank with room, or None: then the call has to wait."""
        router, model = self._router, call.model.name
        if not router.wants_affinity(model):
            return router.choose(model, call.failed)
        session = call.question.session
        if session is not None:
            return router.choose(model, call.failed, session)
        prompt = call.question.prompt
        if len(prompt) < _LEAST_PREFIX_BYTES:
            return router.choose(model, call.failed)
        beginning = bytes(memoryview(prompt)[:_MOST_PREFIX_BYTES])
        return router.choose(model, call.failed, None, prefix_blocks(beginning))

    def ejected_ranks(self) -> dict[str, int]:
        """By model: number of ranks that get nothing because they have failed."""
        counts = dict.fromkeys(self.names, 0)
        for group in self.fleet.groups if self.fleet is not None else ():
            for rank in group.ranks:
                if self._router.health.state(rank.base_url) is RankState.EJECTED:
                    counts[group.model] = counts.get(group.model, 0) + 1
        return counts

    def choose_again(self, call: Call) -> Candidate | None:
        """For a call that has failed at a rank: another one, or else an external provider."""
        candidate = self._router.choose(call.model.name, call.failed)
        if candidate is None and call.model.external:
            candidate = self.choose_external(call, 0.0, True).candidate
        return candidate

    def choose_external(
        self, call: Call, expected_wait_s: float, groups_failed: bool
    ) -> ExternalChoice:
        ask = ExternalAsk(
            endpoint=call.endpoint.name,
            prompt_tokens=call.prompt_guess,
            completion_tokens=call.question.guessed_completion_tokens(call.model.max_model_len),
            ready=self.answers(call.model.name),
            expected_wait_s=expected_wait_s,
            groups_failed=groups_failed,
        )
        return self._router.choose_external(call.model.name, ask, call.failed)

    def begin(self, candidate: Candidate, call: Call) -> None:
        call.sent = self._router.begin(candidate)
        name = candidate.group
        count = self.groups.get(name)
        if count is None:
            count = self.groups[name] = GroupCount(call.model.name, candidate.pool, 1)
        tokens = call.tokens
        count.in_flight += 1
        count.tokens_in_flight += tokens
        count.sent_tokens += call.prompt_guess
        count.requests += 1
        if candidate.external is None:
            self._set_full(name, count)

    def answered(self, call: Call) -> bool:
        """True when that may have brought a rank back."""
        if call.sent is None or self._router.health.all_healthy:
            return False
        self._router.answered(call.sent, self._now_s())
        return True

    def end(self, call: Call, evidence: Evidence | None) -> None:
        """Once for each `begin`."""
        sent, candidate = call.sent, call.candidate
        assert sent is not None and candidate is not None
        call.sent = None
        self._router.end(sent, self._now_s(), evidence, call.attempts_failed > 0)
        count = self.groups[candidate.group]
        count.in_flight -= 1
        count.tokens_in_flight -= call.tokens
        if evidence is not None:
            count.errors += 1
        if count.full:
            self._set_full(candidate.group, count)

    def timed(self, group: str, ttft_s: float, tpot_s: float | None) -> None:
        """Of one answer, for the reports; `ttft_s` from when the rank was asked."""
        count = self.groups.get(group)
        if count is not None:
            count.ttft_s_sum += ttft_s
            count.ttft_count += 1
            if tpot_s is not None:
                count.tpot_s_sum += tpot_s
                count.tpot_count += 1

    def _set_full(self, name: str, count: GroupCount) -> None:
        # For a short request: a long one may go a little above the ceiling.
        full = not has_room(
            self._rules,
            count.load,
            count.ranks,
            count.elsewhere,
            count.in_flight,
            count.tokens_in_flight,
            count.sent_tokens,
            1,
            1,
        )
        if full is not count.full:
            count.full = full
            self._router.set_full(name, full)

    def _forget_gone(self, fleet: Fleet) -> None:
        """Names of groups grow without end; what has left the fleet and is idle is dropped."""
        names = {group.name for group in fleet.groups}
        names.update(route.pool for model in fleet.models for route in model.external)
        for name in [n for n in self.groups if n not in names]:
            if self.groups[name].in_flight == 0:
                del self.groups[name]
