"""NVIDIA Dynamo's planner: a forecast sets a floor, and estimated latencies correct above it.

Sources: "Planner Design", `planner/config/defaults.py`, `core/throughput_scaling.py` and
`core/load_scaling.py` of Dynamo, aggregated mode with `optimization_target: sla` (loops of 180 s
and 5 s, ARIMA, at least 1 engine, sensitivity for scaling down 80 %, 64 samples for the
regression). The GPU budget, 8 by default, is left to the scenario's limits.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil

import numpy as np

from expertmesh.simulator.baselines.forecast import Constant, DampedTrend, Forecast, Kalman
from expertmesh.simulator.baselines.replicas import moves_to, ready, replicas_of, usual_option
from expertmesh.simulator.policy import GroupView, Move, View
from expertmesh.simulator.scenario import Scenario

_LEAST_SAMPLES = 5
_LEAST_TOKENS_PER_S = 1.0
"""With fewer an engine is as good as idle, and says nothing about its iterations."""


class Predictor(StrEnum):
    CONSTANT = "constant"
    ARIMA = "arima"
    KALMAN = "kalman"


def _forecast(predictor: Predictor) -> Forecast:
    match predictor:
        case Predictor.CONSTANT:
            return Constant()
        case Predictor.ARIMA:
            return DampedTrend()
        case Predictor.KALMAN:
            return Kalman()


@dataclass(slots=True)
class Iterations:
    """Seconds of an iteration, regressed on its prompt tokens and the context that it reads."""

    samples: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=64))

    def learn(self, group: GroupView, kv_tokens: int) -> None:
        running = group.in_flight - group.waiting
        if running <= 0.0 or group.output_tokens_per_s < _LEAST_TOKENS_PER_S:
            return
        iteration_s = running / group.output_tokens_per_s
        prompt_tokens = group.prompt_tokens_per_s * iteration_s
        self.samples.append((prompt_tokens, group.kv_usage * kv_tokens, iteration_s))

    def fit(self) -> tuple[float, float, float] | None:
        """Seconds of an empty one, of a prompt token and of a token of context; None: too few."""
        if len(self.samples) < _LEAST_SAMPLES:
            return None
        table = np.array(self.samples)
        known = np.column_stack((np.ones(len(table)), table[:, 0], table[:, 1]))
        found, *_ = np.linalg.lstsq(known, table[:, 2], rcond=None)
        return float(found[0]), max(0.0, float(found[1])), max(0.0, float(found[2]))


@dataclass(slots=True)
class Dynamo:
    scenario: Scenario
    throughput_interval_s: float = 180.0
    load_interval_s: float = 5.0
    predictor: Predictor = Predictor.ARIMA
    load_scaling: bool = True
    """False, the published default, leaves the forecast alone; the guide advises both."""
    down_sensitivity: float = 0.8
    """Share of the target that must hold with one engine fewer."""
    headroom: float = 1.0
    """Factor on the predicted rate; not Dynamo's, which has none."""
    least: int = 1
    option: int | None = None
    name: str = "dynamo"
    _rate: Forecast = field(init=False)
    _prompt: Forecast = field(init=False)
    _output: Forecast = field(init=False)
    _iterations: Iterations = field(default_factory=Iterations)
    _arrivals: float = 0.0
    _since_s: float | None = None
    _seen_s: float = 0.0
    _next_load_s: float = 0.0
    _floor: int = 0

    def __post_init__(self) -> None:
        self._rate = _forecast(self.predictor)
        self._prompt = _forecast(self.predictor)
        self._output = _forecast(self.predictor)

    def decide(self, view: View) -> tuple[Move, ...]:
        option = usual_option(self.scenario) if self.option is None else self.option
        replicas = replicas_of(view, option)
        service = self.scenario.options[option].service
        for group in ready(replicas):
            self._iterations.learn(group, service.kv_tokens)
        least = max(self.least, self.scenario.min_groups)
        forecast = self._from_forecast(view, option)
        if forecast is not None:
            self._floor = forecast
            if not self.load_scaling:
                return moves_to(view, option, max(least, forecast))
        if len(replicas) < least:
            return moves_to(view, option, least)
        if not self.load_scaling or view.now_s < self._next_load_s:
            return ()
        self._next_load_s = view.now_s + self.load_interval_s
        serving = ready(replicas)
        if len(serving) < len(replicas) or not serving:
            # Nothing is decided while an earlier decision is under way.
            return ()
        wanted = len(serving) + self._from_load(view, option, serving)
        return moves_to(view, option, max(least, self._floor, wanted))

    def _from_forecast(self, view: View, option: int) -> int | None:
        """Engines for the predicted load; None between two intervals."""
        if self._since_s is None:
            self._since_s = self._seen_s = view.now_s
            return None
        self._arrivals += view.arrivals_per_s * (view.now_s - self._seen_s)
        self._seen_s = view.now_s
        span_s = view.now_s - self._since_s
        if span_s < self.throughput_interval_s:
            return None
        arrivals_per_s = self._arrivals / span_s
        self._arrivals, self._since_s = 0.0, view.now_s
        self._rate.add(arrivals_per_s)
        if view.finished_output_tokens > 0.0:
            self._prompt.add(view.finished_prompt_tokens)
            self._output.add(view.finished_output_tokens)
        rates = self.scenario.options[option].option.rates
        seconds = rates.seconds(self._prompt.next(), self._output.next())
        if seconds is None:
            return None
        return ceil(self.headroom * self._rate.next() * seconds)

    def _from_load(self, view: View, option: int, serving: list[GroupView]) -> int:
        """1, 0 or -1."""
        fit = self._iterations.fit()
        if fit is None:
            return 0
        count = len(serving)
        now = [self._latencies(view, option, group, fit, count, 1.0) for group in serving]
        slo = self.scenario.slo
        if all(ttft_s > slo.ttft_s for ttft_s, _, _, _ in now):
            return 1
        if all(tpot_s > slo.tpot_s for _, tpot_s, _, _ in now):
            return 1
        if count < 2:
            return 0
        share = count / (count - 1.0)
        after = [self._latencies(view, option, group, fit, count, share) for group in serving]
        kv_tokens = self.scenario.options[option].service.kv_tokens
        safe = all(
            ttft_s - own_s < (slo.ttft_s - own_s) * self.down_sensitivity
            and tpot_s < slo.tpot_s * self.down_sensitivity
            and context < kv_tokens
            for ttft_s, tpot_s, own_s, context in after
        )
        return -1 if safe else 0

    def _latencies(
        self,
        view: View,
        option: int,
        group: GroupView,
        fit: tuple[float, float, float],
        count: int,
        share: float,
    ) -> tuple[float, float, float, float]:
        """Seconds to the first token and between two, of the first the part without a queue, and
        tokens of context, if each engine had `share` times the load."""
        empty_s, prompt_s, context_s = fit
        service = self.scenario.options[option].service
        prompt = view.finished_prompt_tokens
        context = share * group.kv_usage * service.kv_tokens
        waiting = share * (group.waiting + view.queued / count)
        chunk = float(service.max_batched_tokens)
        decode_s = empty_s + context_s * context

        def prefill_s(tokens: float) -> float:
            return ceil(tokens / chunk) * decode_s + prompt_s * tokens

        beside = share * group.prompt_tokens_per_s * decode_s
        held = context + waiting * prompt
        tpot_s = empty_s + prompt_s * min(beside, chunk) + context_s * held
        own_s = prefill_s(prompt)
        return prefill_s(waiting * prompt + prompt), tpot_s, own_s, held
