"""What a gateway of the fluid mode has counted, seen as late as metrics are."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from expertmesh.simulator.flow import Flow
from expertmesh.simulator.policy import View
from expertmesh.simulator.scenario import Scenario

Floats = NDArray[np.float64]


class LateCounts:
    def __init__(self, flow: Flow, scenario: Scenario) -> None:
        self._tick_s = scenario.tick_s
        self._delay_s = scenario.metric_delay_s
        self._arrived = np.concatenate(([0.0], np.cumsum(flow.requests))).tolist()
        self._arrived_prompt = np.concatenate(([0.0], np.cumsum(flow.prompt_tokens))).tolist()
        self._finished = [0.0] * (flow.ticks + 1)
        self._finished_output = list(self._finished)
        self._finished_prompt = list(self._finished)
        self._queued = list(self._finished)
        self._oldest_s = list(self._finished)
        self._mean_prompt = flow.mean_prompt

    def note(self, tick: int, gone: Floats, queued: float, oldest_s: float) -> None:
        """At the end of a tick; `gone` is requests, output tokens and prompt tokens."""
        requests, output, prompt = gone.tolist()
        self._finished[tick + 1] = self._finished[tick] + requests
        self._finished_output[tick + 1] = self._finished_output[tick] + output
        self._finished_prompt[tick + 1] = self._finished_prompt[tick] + prompt
        self._queued[tick + 1] = queued
        self._oldest_s[tick + 1] = oldest_s

    def view(self, now_s: float, view: View) -> View:
        """With the traffic filled in."""
        until = (now_s - self._delay_s) / self._tick_s
        since = until - view.window_s / self._tick_s

        def during(total: list[float]) -> float:
            return _between(total, until) - _between(total, since)

        finished = during(self._finished)
        queued = _between(self._queued, until)
        mean_prompt = float(self._mean_prompt[max(0, min(int(until), len(self._mean_prompt) - 1))])
        return replace(
            view,
            queued=queued,
            queued_prompt_tokens=queued * mean_prompt,
            oldest_wait_s=_between(self._oldest_s, until),
            arrivals_per_s=during(self._arrived) / view.window_s,
            arrived_prompt_tokens_per_s=during(self._arrived_prompt) / view.window_s,
            finished_per_s=finished / view.window_s,
            finished_prompt_tokens=during(self._finished_prompt) / finished
            if finished > 0
            else 0.0,
            finished_output_tokens=during(self._finished_output) / finished
            if finished > 0
            else 0.0,
        )


def _between(values: list[float], at: float) -> float:
    if at <= 0:
        return values[0]
    low = int(at)
    if low >= len(values) - 1:
        return values[-1]
    return values[low] + (at - low) * (values[low + 1] - values[low])
