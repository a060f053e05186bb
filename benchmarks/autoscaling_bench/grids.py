"""The parameters among which each policy is tuned, as texts for `read_policy`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.autoscaling_bench.cases import Situation

from expertmesh.core.domain.hardware import Market
from expertmesh.launch.policies import OWN, policy_names, without_gaps
from expertmesh.simulator.baselines.replicas import usual_option
from expertmesh.simulator.scenario import Scenario

_AIMS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


@dataclass(frozen=True, slots=True)
class Candidate:
    policy: str
    """With its parameters."""
    aim: float | None = None
    """In place of the scenario's attainment, for a policy that heeds it."""

    @property
    def name(self) -> str:
        return self.policy.partition(":")[0]

    @property
    def parameters(self) -> str:
        given = self.policy.partition(":")[2].replace(",", ", ")
        aim = "" if self.aim is None else f"attainment={self.aim:g}"
        return ", ".join(filter(None, (given, aim)))

    def scenario(self, made: Scenario) -> Scenario:
        if self.aim is None:
            return made
        return replace(made, slo=replace(made.slo, attainment=self.aim))


def published(situation: Situation) -> list[Candidate]:
    """Every policy with its defaults; what has none comes from the load."""
    texts = (
        without_gaps(name, situation.scenario, situation.load)
        for name in policy_names()
        if name != "static"
    )
    return [Candidate(text) for text in texts]


def grid(name: str, situation: Situation, *, thin: bool = False) -> list[Candidate]:
    """What is published is among them; `thin`: only a few."""
    if name == OWN:
        found = [Candidate(OWN, aim) for aim in _AIMS]
    else:
        found = [Candidate(text) for text in _texts(name, situation)]
        if name != "static":
            found.append(Candidate(without_gaps(name, situation.scenario, situation.load)))
    return found[:: max(1, len(found) // 4)] if thin else found


def _texts(name: str, situation: Situation) -> list[str]:
    scenario = situation.scenario
    several = len({option.option.name for option in scenario.options}) > 1
    options: Iterable[int] = (usual_option(scenario),)
    if several:
        on_demand = (i for i, o in enumerate(scenario.options) if o.market is Market.ON_DEMAND)
        options = tuple(on_demand)
    texts: list[str] = []
    for option in options:
        for values in _products(_ranges(name, situation, option)):
            chosen = {**values, "option": f"{option}"} if several else dict(values)
            if name in ("wva-v1", "wva-v2", "skyserve"):
                # They know all options themselves.
                chosen.pop("option", None)
            given = ",".join(f"{key}={value}" for key, value in chosen.items())
            texts.append(f"{name}:{given}")
    return list(dict.fromkeys(texts))


_Range = Mapping[str, Sequence[object]]


def _ranges(name: str, situation: Situation, option: int) -> list[_Range]:
    """Several rectangles of parameters."""
    scenario, load = situation.scenario, situation.load
    rates = scenario.options[option].option.rates
    shares = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75)
    full = [round(rates.in_flight * share) for share in shares]
    match name:
        case "static":
            need = situation.problem.loads[:, option]
            first, last = max(1, int(need.mean())), 2 * int(need.max()) + 2
            return [{"groups": range(first, min(last, scenario.options[option].max_groups) + 1)}]
        case "ray-serve":
            return [
                {
                    "target_ongoing_requests": full,
                    "upscale_delay_s": (up_s,),
                    "downscale_delay_s": down_s,
                }
                for up_s, down_s in ((0, (300, 1200)), (30, (600,)))
            ]
        case "keda-waiting":
            return [{"threshold": (1, 5, 20, 50), "down_window_s": (300, 900, 1800)}]
        case "keda-running":
            return [{"threshold": full, "down_window_s": (300, 900, 1800)}]
        case "knative":
            return [
                {
                    "concurrency": [round(value / 0.7) for value in full],
                    "scale_down_delay_s": (0, 600, 1200),
                }
            ]
        case "wva-v1":
            return [
                {
                    "kv_cache_threshold": (kv,),
                    "kv_spare": (kv / 8,),
                    "queue_threshold": (5, 50),
                    "queue_spare": (3,),
                    "interval_s": (30,),
                }
                for kv in (0.8, 0.4, 0.3, 0.2, 0.15, 0.1)
            ]
        case "wva-v2":
            return [
                {
                    "scale_up_threshold": (up,),
                    "scale_down_boundary": (round(up - 0.15, 2),),
                    "down_window_s": (300, 900, 1800),
                }
                for up in (0.85, 0.7, 0.6, 0.5, 0.4)
            ]
        case "dynamo":
            headrooms = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
            return [
                {"load_scaling": (load_too,), "headroom": headrooms, "predictor": predictors}
                for load_too, predictors in (("false", ("arima", "constant")), ("true", ("arima",)))
            ]
        case "skyserve":
            requests = max(float(load.requests.sum()), 1.0)
            prompt, output = load.prompt_tokens.sum(), load.output_tokens.sum()
            seconds = rates.seconds(float(prompt) / requests, float(output) / requests)
            assert seconds is not None
            spot = any(o.market is Market.SPOT for o in scenario.options)
            return [
                {
                    "requests_per_s": [f"{share / seconds:.3g}" for share in shares],
                    "upscale_delay_s": (60, 300),
                    "downscale_delay_s": (600,),
                    **({"base_on_demand": (0, 3)} if spot else {}),
                }
            ]
    raise ValueError(f"no parameters are known for {name}")


def _products(ranges: Iterable[_Range]) -> Iterable[Mapping[str, object]]:
    for one in ranges:
        for values in product(*one.values()):
            yield dict(zip(one, values, strict=True))
