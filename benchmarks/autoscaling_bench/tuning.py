"""Runs candidates, and chooses the cheapest that attains the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.autoscaling_bench.cases import Situation
from benchmarks.autoscaling_bench.grids import Candidate

from expertmesh.launch.policies import read_policy
from expertmesh.simulator.baselines.replicas import usual_option
from expertmesh.simulator.baselines.static import Static
from expertmesh.simulator.events import simulate_events
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.outcome import Outcome

GOAL = 0.99


@dataclass(frozen=True, slots=True)
class Tried:
    candidate: Candidate
    usd: float
    """Over all parts, per seed."""
    attained: float
    """Of the part where it was least."""


@dataclass(frozen=True, slots=True)
class Tuned:
    chosen: Tried
    tried: tuple[Tried, ...]

    @property
    def front(self) -> tuple[Tried, ...]:
        """Those than which no other is cheaper and better, by cost."""
        kept: list[Tried] = []
        for one in sorted(self.tried, key=lambda t: (t.usd, -t.attained)):
            if not kept or one.attained > kept[-1].attained:
                kept.append(one)
        return tuple(kept)


def run(situation: Situation, candidate: Candidate, *, event: bool = False) -> Outcome:
    make = read_policy(candidate.policy)
    policy = make(situation.scenario)
    started = situation.scenario
    option: int | None = getattr(policy, "option", None)
    if isinstance(policy, Static):
        # It never was another fleet.
        option = usual_option(started) if option is None else option
        started = situation.starting_with(option, policy.groups)
    elif option is not None:
        # It would never let go of groups of another option.
        started = situation.starting_with(option)
    scenario = candidate.scenario(started)
    if event:
        return simulate_events(scenario, situation.requests, make)
    return simulate_fluid(scenario, situation.load, make)


def attempt(situations: Sequence[Situation], candidate: Candidate, *, event: bool = False) -> Tried:
    """Attainment is the mean over the seeds of one part, and the least of those over the parts."""
    usd: dict[str, list[float]] = {}
    attained: dict[str, list[float]] = {}
    for situation in situations:
        outcome = run(situation, candidate, event=event)
        part = f"{situation.part}"
        usd.setdefault(part, []).append(outcome.usd)
        attained.setdefault(part, []).append(outcome.attainment.both)
    return Tried(
        candidate,
        sum(mean(values) for values in usd.values()),
        min(mean(values) for values in attained.values()),
    )


def tune(
    situations: Sequence[Situation],
    candidates: Sequence[Candidate],
    *,
    event: bool = False,
    goal: float = GOAL,
) -> Tuned:
    """The cheapest that attains the goal; where none does, the one that comes nearest."""
    tried = tuple(attempt(situations, candidate, event=event) for candidate in candidates)
    return Tuned(choose(tried, goal), tried)


def choose(tried: Sequence[Tried], goal: float) -> Tried:
    enough = [one for one in tried if one.attained >= goal]
    if enough:
        return min(enough, key=lambda one: (one.usd, -one.attained))
    return max(tried, key=lambda one: (one.attained, -one.usd))
