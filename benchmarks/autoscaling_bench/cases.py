"""What is measured: a scenario, a trace, the part to tune on and the part to report."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.baselines.replicas import usual_option
from expertmesh.simulator.oracle import Least, Problem, least_cost, problem, static_peaks
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.scenario_file import load_scenario
from expertmesh.simulator.trace_file import read_trace
from expertmesh.simulator.workload import Load, Requests, Trace

SCENARIOS = Path(__file__).parents[1] / "scenarios"
_FINE_S = 1.0
_FIRST_MIN = 10
_SPARE = 1.2
"""Groups at the start for each that the load then needs."""


@dataclass(frozen=True, slots=True)
class Part:
    """Hours of a trace; None: to its end."""

    trace: str
    start_h: float = 0.0
    end_h: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    title: str
    scenario: str
    scale: float
    tune: tuple[Part, ...]
    report: Part
    whole: Part | None
    """None: too long to be run once more."""
    tune_seeds: tuple[int, ...] = (101,)
    event: bool = False
    """Short enough for the event mode."""


_R1 = "servegen/deepseek-r1_clients.csv"
_RAMP = "servegen/deepseek-r1_sample_ramp2h.csv"
_LARGE = "servegen/m-large_week1_clients.csv"
_CONV = "AzureLLMInferenceTrace_conv.csv"
_CODE = "AzureLLMInferenceTrace_code.csv"
_THIRD_H = 1 / 3


def _r1(name: str, title: str) -> Case:
    return Case(
        name,
        title,
        name,
        4.0,
        tune=(Part(_RAMP), Part(_R1, 0.0, 8.0)),
        report=Part(_R1, 8.0),
        whole=Part(_R1),
    )


def _azure(name: str, title: str, trace: str) -> Case:
    return Case(
        name,
        title,
        "azure",
        16.0,
        tune=(Part(trace, 0.0, _THIRD_H),),
        report=Part(trace, _THIRD_H),
        whole=Part(trace),
        event=True,
    )


CASES = (
    _r1("r1-ep16", "DeepSeek-R1's day, four times; EP16 on demand"),
    _r1("r1-mixed", "DeepSeek-R1's day, four times; EP8, EP16 and EP32 on demand"),
    _r1("r1-spot", "DeepSeek-R1's day, four times; EP16 on demand and in three spot zones"),
    Case(
        "m-large",
        "A large chat model's week; EP16 on demand",
        "m-large",
        1.0,
        tune=(Part(_LARGE, 0.0, 72.0),),
        report=Part(_LARGE, 72.0),
        whole=None,
    ),
    _azure("azure-code", "Azure's hour of code, sixteen times; EP8 on demand", _CODE),
    _azure("azure-conv", "Azure's hour of chat, sixteen times; EP8 on demand", _CONV),
)


@dataclass
class Situation:
    """One part of a case with one seed: everything that does not depend on the policy."""

    case: Case
    part: Part
    seed: int
    traces: Path

    @cached_property
    def trace(self) -> Trace:
        part = self.part
        whole: Trace = read_trace(self.traces / part.trace)
        if part.start_h or part.end_h is not None:
            end_s = whole.span_s if part.end_h is None else part.end_h * 3600
            whole = whole.between(part.start_h * 3600, end_s)
        return whole.scaled(self.case.scale, self.seed)

    @cached_property
    def load(self) -> Load:
        return self.trace.load(_FINE_S, self.seed)

    @cached_property
    def requests(self) -> Requests:
        return self.trace.sample(self.seed)

    @cached_property
    def scenario(self) -> Scenario:
        """With a fleet of the usual option at the start."""
        return self.starting_with(usual_option(self._made))

    def starting_with(self, option: int, groups: int | None = None) -> Scenario:
        """With so many groups at the start or, as what was before is not known, as many as fit the
        first minutes and the mean."""
        made = self._made
        if groups is None:
            loads = self.problem.loads[:, option]
            usual = max(float(loads[:_FIRST_MIN].mean()), float(loads.mean()))
            groups = max(ceil(_SPARE * usual), made.min_groups)
        initial = [0] * len(made.options)
        initial[option] = min(groups, made.options[option].max_groups)
        return replace(made, initial_groups=tuple(initial))

    @cached_property
    def _made(self) -> Scenario:
        return load_scenario(SCENARIOS / f"{self.case.scenario}.yaml", self.seed)

    @cached_property
    def problem(self) -> Problem:
        return problem(self._made, self.load)

    @cached_property
    def oracle(self) -> Least:
        """Raises ValueError when no fleet serves all of it."""
        found = least_cost(self.problem)
        if not isinstance(found, Least):
            raise ValueError(f"{self.case.name}: no fleet serves minute {found.bin}: more groups?")
        return found

    @cached_property
    def static_usd(self) -> float:
        """The cheapest number of groups of one size on demand that always suffices, known
        afterwards.

        Raises ValueError when there is none.
        """
        peaks = zip(static_peaks(self.problem), self.scenario.options, strict=True)
        found = [peak[0] for peak, o in peaks if peak and o.market is Market.ON_DEMAND]
        if not found:
            raise ValueError(f"{self.case.name}: no option alone serves its peak: more groups?")
        return min(found)
