"""What would have had to be different for another choice: found by deciding again.

Each is told with the setting that makes it true and the nearest one that does not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.scaling.candidates import Choice, mix_text
from expertmesh.core.scaling.contract import Binding, Decision
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.core.scaling.what_if import changed

_FIGURES = 4
"""Of a price that is looked for."""
_MOST_TIMES = 64
"""Of a price, a load or a budget: beyond it nothing is looked for."""
_MOST_QUEUED = 1 << 20
_MOST_NODES = 4096
_MOST_GROUPS = 1024


class Effect(StrEnum):
    """On what there should be, compared with what was decided."""

    MORE = "more"
    """More groups of one option."""
    FEWER = "fewer"
    """Fewer groups of one option."""
    GROWS = "grows"
    """Of some option, more groups than there are."""
    RESTS = "rests"
    """Of no option."""
    OTHER = "other"
    """Anything else than was decided."""


@dataclass(frozen=True, slots=True)
class Counterfactual:
    text: str
    effect: Effect
    option: str | None
    """That `MORE` and `FEWER` are about."""
    flips: str | None
    """The nearest setting with which it would have been so; None: with none that was tried."""
    keeps: str | None
    """The setting next to it with which it would not."""
    target: dict[str, int]
    """Groups by option with the setting that flips."""


def has_effect(
    effect: Effect,
    option: str | None,
    there: Mapping[str, int],
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> bool:
    """`there`: active groups; `before` and `after`: groups wanted as decided and as changed."""
    match effect:
        case Effect.MORE:
            return after.get(option or "", 0) > before.get(option or "", 0)
        case Effect.FEWER:
            return after.get(option or "", 0) < before.get(option or "", 0)
        case Effect.GROWS:
            return any(n > there.get(name, 0) for name, n in after.items())
        case Effect.RESTS:
            return not any(n > there.get(name, 0) for name, n in after.items())
        case Effect.OTHER:
            return {k: n for k, n in after.items() if n} != {k: n for k, n in before.items() if n}


def counterfactuals(record: DecisionRecord, choice: Choice) -> tuple[Counterfactual, ...]:
    return tuple(_Search(record, choice).run())


class _Search:
    def __init__(self, record: DecisionRecord, choice: Choice) -> None:
        self.record = record
        self.choice = choice
        offers = choice.question.problem.offers
        self.there = {
            offer.option: n for offer, n in zip(offers, choice.question.problem.active, strict=True)
        }
        self.before = changed(record).decision.target
        self.decided: dict[str, Decision] = {}

    def run(self) -> list[Counterfactual]:
        grows = has_effect(Effect.GROWS, None, self.there, self.before, self.before)
        found: list[Counterfactual | None] = []
        found += self._limits()
        found += self._work(grows)
        found += [self._price(option.name) for option in self.record.config.options]
        return [each for each in found if each is not None]

    # What is looked for

    def _price(self, name: str) -> Counterfactual | None:
        option = next(each for each in self.record.config.options if each.name == name)
        price = option.usd_per_hour
        if price <= 0:
            return None
        digits = max(2, _FIGURES - 1 - math.floor(math.log10(price)))
        step = 10.0**-digits
        at = math.floor(price / step)

        def setting(i: int) -> str:
            return f"price.{name}={i * step:.{digits}f}"

        wanted, there = self.before.get(name, 0), self.there.get(name, 0)
        if wanted > there:
            found = self._first(Effect.FEWER, name, setting, at, at * _MOST_TIMES)
            if found is None:
                return None
            flips, keeps = found
            return self._told(
                Effect.FEWER,
                name,
                setting(flips),
                setting(keeps),
                f"with {name} at {_usd(flips * step)}/h a group (it costs {_usd(price)})",
            )
        found = self._first(Effect.MORE, name, setting, at + 1, 1)
        if found is None:
            return Counterfactual(
                text=f"at no price it would have had more of {name}{self._bar_of(name)}",
                effect=Effect.MORE,
                option=name,
                flips=None,
                keeps=setting(1),
                target={},
            )
        flips, keeps = found
        return self._told(
            Effect.MORE,
            name,
            setting(flips),
            setting(keeps),
            f"with {name} at {_usd(flips * step)}/h a group (it costs {_usd(price)})",
        )

    def _bar_of(self, name: str) -> str:
        for candidate in self.choice.candidates:
            if candidate.name == f"+1 {name}":
                return f": {candidate.why}" if candidate.is_barred else ""
        return ""

    def _work(self, grows: bool) -> list[Counterfactual | None]:
        demand = self.record.decision.demand
        found: list[Counterfactual | None] = []
        if self.choice.question.load.needed > 0:

            def load(i: int) -> str:
                return f"load={i / 1000:.3f}x"

            if grows:
                pair = self._first(Effect.RESTS, None, load, 1000, 0)
                effect, words = Effect.RESTS, "or less"
            else:
                pair = self._first(Effect.GROWS, None, load, 1000, 1000 * _MOST_TIMES)
                effect, words = Effect.GROWS, "or more"
            if pair is not None:
                flips, keeps = pair
                decided = self._decide(load(flips))
                if self.choice.question.load.by_tokens:
                    need = f"{decided.load.now:.3g} groups"
                else:
                    need = f"{decided.demand.work} requests"
                words = self._and_on(effect, load, pair, words)
                text = f"with a load of {need}{words} ({flips / 1000:.0%} of what it was)"
                found.append(self._told(effect, None, load(flips), load(keeps), text))

        def queue(i: int) -> str:
            return f"queue={i}"

        if grows and demand.queued > 0:
            pair = self._first(Effect.RESTS, None, queue, demand.queued, 0)
            if pair is not None:
                words = self._and_on(Effect.RESTS, queue, pair, "or fewer")
                text = f"with {pair[0]} queued requests{words}"
                found.append(self._told(Effect.RESTS, None, queue(pair[0]), queue(pair[1]), text))
        elif not grows and self.record.observation.gateways:
            pair = self._first(Effect.GROWS, None, queue, demand.queued, _MOST_QUEUED)
            if pair is not None:
                words = self._and_on(Effect.GROWS, queue, pair, "or more")
                text = f"with {pair[0]} queued requests{words}"
                found.append(self._told(Effect.GROWS, None, queue(pair[0]), queue(pair[1]), text))
        return found

    def _limits(self) -> list[Counterfactual | None]:
        rules, binding = self.record.config.rules, self.choice.target.binding
        found: list[Counterfactual | None] = []
        if binding is Binding.BUDGET:
            for key, limit in (
                ("budget", rules.usd_per_hour_budget),
                ("budget_per_day", rules.usd_per_day_budget),
            ):
                if limit is not None:
                    found.append(self._budget(key, limit))
        if binding is Binding.MAX_GROUPS:
            found.append(self._count("max_groups", rules.max_groups, _MOST_GROUPS, "or more"))
        if binding is Binding.MIN_GROUPS and rules.min_groups > 0:
            found.append(self._count("min_groups", rules.min_groups, 0, "or less"))
        if binding is Binding.ROOM:
            live = {seen.name: seen.live_workers for seen in self.record.observation.pools}
            for name in {option.pool: None for option in self.record.config.options}:
                pool = next((each for each in self.record.config.pools if each.name == name), None)
                if pool is not None:
                    known = live.get(name)
                    nodes = pool.max_nodes
                    if pool.market.value == "local" and known is not None:
                        nodes = known // pool.workers_per_node
                    found.append(self._count(f"nodes.{name}", nodes, _MOST_NODES, "or more"))
        return found

    def _budget(self, key: str, limit: float) -> Counterfactual | None:
        def setting(i: int) -> str:
            return f"{key}={i / 100:.2f}"

        at = math.floor(limit * 100)
        pair = self._first(Effect.OTHER, None, setting, at, max(at, 100) * _MOST_TIMES)
        if pair is None:
            return None
        unit = "day" if key == "budget_per_day" else "h"
        words = self._and_on(Effect.OTHER, setting, pair, "or more")
        text = f"with a budget of ${pair[0] / 100:,.2f}/{unit}{words} (it is ${limit:,.2f})"
        return self._told(Effect.OTHER, None, setting(pair[0]), setting(pair[1]), text)

    def _count(self, key: str, at: int, last: int, words: str) -> Counterfactual | None:
        def setting(i: int) -> str:
            return f"{key}={i}"

        pair = self._first(Effect.OTHER, None, setting, at, last)
        if pair is None:
            return None
        words = self._and_on(Effect.OTHER, setting, pair, words)
        text = f"with {key} {pair[0]}{words} (it is {at})"
        return self._told(Effect.OTHER, None, setting(pair[0]), setting(pair[1]), text)

    # How it is looked for

    def _first(
        self,
        effect: Effect,
        option: str | None,
        setting: Callable[[int], str],
        start: int,
        end: int,
    ) -> tuple[int, int] | None:
        """The first step on the way from `start` to `end` with the effect, and the one before it;
        None when `start` has it already, or nothing that was tried."""

        def holds(i: int) -> bool:
            after = self._decide(setting(i)).target
            return has_effect(effect, option, self.there, self.before, after)

        if start == end or holds(start):
            return None
        sign = 1 if end > start else -1
        low, high, reach = start, end, 1
        while True:
            probe = start + sign * reach
            if (end - probe) * sign <= 0:
                if not holds(end):
                    return None
                break
            if holds(probe):
                high = probe
                break
            low, reach = probe, reach * 2
        while abs(high - low) > 1:
            middle = (low + high) // 2
            if holds(middle):
                high = middle
            else:
                low = middle
        return high, low

    def _and_on(
        self, effect: Effect, setting: Callable[[int], str], pair: tuple[int, int], words: str
    ) -> str:
        """`words` where it is so far beyond as well: the mix may be again what it was, or another
        may want to grow, and then only the spot is told."""
        flips, keeps = pair
        far = round(flips / 2) if flips < keeps else flips * 2
        after = self._decide(setting(far)).target
        return f" {words}" if has_effect(effect, None, self.there, self.before, after) else ""

    def _decide(self, setting: str) -> Decision:
        known = self.decided.get(setting)
        if known is None:
            known = self.decided[setting] = changed(self.record, setting).decision
        return known

    def _told(
        self, effect: Effect, option: str | None, flips: str, keeps: str, condition: str
    ) -> Counterfactual:
        target = dict(self._decide(flips).target)
        match effect:
            case Effect.RESTS:
                outcome = "it would not have asked for another group"
            case _:
                outcome = f"it would have wanted {mix_text(target)}"
        return Counterfactual(f"{condition} {outcome}", effect, option, flips, keeps, target)


def _usd(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"
