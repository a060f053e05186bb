"""A load by ticks, and what it asks of the groups of a scenario."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.workload import Load

Floats = NDArray[np.float64]

_MIX_S = 60.0
"""Requests of about this long ago and less are those that a group now serves, at least."""
_LITTLE = 1e-3


@dataclass(frozen=True, slots=True)
class Flow:
    """The load by tick, and what it asks of one group of each option."""

    ticks: int
    requests: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    mean_prompt: Floats
    """Of the requests that groups serve in that tick."""
    mean_output: Floats
    loads: Floats
    """Ticks x options."""

    @classmethod
    def of(cls, scenario: Scenario, load: Load) -> "Flow":
        tick_s = scenario.tick_s
        ticks = max(1, math.ceil(load.span_s / tick_s - 1e-9))
        columns = (load.requests, load.prompt_tokens, load.output_tokens)
        requests, prompt, output = (
            _by_tick(column, load.bin_s, tick_s, ticks) for column in columns
        )
        mean_prompt, mean_output = _mix(requests, prompt, output, scenario)
        rates = [
            slo_rates(
                option.service, scenario.slo.tpot_s, mean_prompt, mean_output, scenario.output_cv2
            )
            for option in scenario.options
        ]
        return cls(
            ticks,
            requests,
            prompt,
            output,
            mean_prompt,
            mean_output,
            np.array([rate.seconds(prompt, output) / tick_s for rate in rates]).T.copy(),
        )


def _by_tick(column: Floats, bin_s: float, tick_s: float, ticks: int) -> Floats:
    """What arrives in a bin arrives evenly over it."""
    total = np.concatenate(([0.0], np.cumsum(column)))
    edges = np.arange(ticks + 1) * tick_s
    return np.diff(np.interp(edges, np.arange(len(total)) * bin_s, total))


def _mix(
    requests: Floats, prompt: Floats, output: Floats, scenario: Scenario
) -> tuple[Floats, Floats]:
    """Mean sizes over the time that a request stays; it stands still while nothing arrives."""
    total = max(float(requests.sum()), 1e-9)
    stay_s = max(_MIX_S, float(output.sum()) / total * scenario.slo.tpot_s)
    keep = math.exp(-scenario.tick_s / stay_s)
    # Before the first request the sizes are those of the whole load.
    count, prompts, outputs = _LITTLE * np.array([total, prompt.sum(), output.sum()]) / total
    means = []
    columns = (requests.tolist(), prompt.tolist(), output.tolist())
    for new, new_prompt, new_output in zip(*columns, strict=True):
        if new > 0:
            count = count * keep + new
            prompts = prompts * keep + new_prompt
            outputs = outputs * keep + new_output
        means.append((prompts / count, outputs / count))
    array = np.array(means)
    return array[:, 0], np.maximum(array[:, 1], 1.0)
