"""The comparison must find a difference where there is one, and none where there is none."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from benchmarks import simulator_fidelity
from benchmarks.load import Target
from benchmarks.simulator_fidelity import (
    BATCH_OUTPUT,
    BATCHES,
    BESIDE,
    BESIDE_OUTPUT,
    PROMPTS,
    Answered,
    Batch,
    Calibrated,
    FirstToken,
    Level,
    Measured,
    as_sent,
    calibrate,
    figure,
    from_json,
    leave_it,
    live,
    measure,
    scenario_of,
    simulated,
    trace,
)
from rich.console import Console

from expertmesh.simulator.events import run_events
from expertmesh.simulator.service_time import ServiceTime

TRUTH = ServiceTime(0.019, 3e-4, 2e-7, 100_000, 256, 9000, prompt_s=1e-4)
OVERHEAD_S = 0.006


def first_token_s(prompt_tokens: int) -> float:
    """Beside the others, from the middle of an iteration to the end of the next."""
    context = BESIDE * BESIDE_OUTPUT / 2
    before_s = TRUTH.iteration_s(BESIDE, context, 0)
    return OVERHEAD_S + before_s / 2 + TRUTH.iteration_s(BESIDE, context, prompt_tokens)


def measured(levels: tuple[Level, ...] = ()) -> Measured:
    """What would be measured of such an engine."""
    return Measured(
        tuple(Batch(b, p, TRUTH.iteration_s(b, b * (p + BATCH_OUTPUT / 2), 0)) for b, p in BATCHES),
        tuple(FirstToken(p, first_token_s(p)) for p in PROMPTS),
        TRUTH.kv_tokens,
        TRUTH.max_seqs,
        levels,
    )


def test_the_service_times_are_found_again() -> None:
    calibrated = calibrate(measured())
    service = calibrated.service
    assert service.alpha_s == pytest.approx(TRUTH.alpha_s)
    assert service.beta_s == pytest.approx(TRUTH.beta_s)
    assert service.gamma_s == pytest.approx(TRUTH.gamma_s)
    assert service.prompt_token_s == pytest.approx(1e-4)
    assert calibrated.overhead_s == pytest.approx(OVERHEAD_S)


def test_one_batch_that_was_read_late_does_not_draw_the_fit_to_itself() -> None:
    whole = measured()
    late = replace(whole.batches[2], tpot_s=whole.batches[2].tpot_s / 4)
    calibrated = calibrate(replace(whole, batches=(*whole.batches, late, *whole.batches)))
    assert calibrated.service.alpha_s == pytest.approx(TRUTH.alpha_s)
    assert calibrated.errors == pytest.approx([0.0] * len(BATCHES), abs=1e-9)


def test_first_tokens_that_do_not_depend_on_the_prompt_are_no_negative_time() -> None:
    flat = replace(measured(), first_tokens=tuple(FirstToken(p, 0.03 - 1e-7 * p) for p in PROMPTS))
    assert calibrate(flat).service.prompt_token_s == 0.0


def level_of(calibrated: Calibrated, slower: float = 1.0) -> Level:
    """A live run that was just as the simulator says, or slower by a factor."""
    requests = trace(8.0, 3)
    service = calibrated.service
    slow = replace(
        service,
        alpha_s=slower * service.alpha_s,
        beta_s=slower * service.beta_s,
        gamma_s=slower * service.gamma_s,
    )
    times = run_events(scenario_of(slow), requests, leave_it).times
    answers = [
        Answered(at_s, first_s + OVERHEAD_S, end_s - at_s + OVERHEAD_S, int(tokens))
        for at_s, first_s, end_s, tokens in zip(
            requests.at_s, times.ttft_s, times.end_s, times.output_tokens, strict=True
        )
    ]
    return Level(8.0, 3, tuple(answers))


def test_a_live_run_like_the_simulated_one_has_ratios_of_one() -> None:
    calibrated = calibrate(measured())
    level = level_of(calibrated)
    real, model = live(level), simulated(calibrated, level)
    assert model.tokens_per_s == pytest.approx(real.tokens_per_s, rel=1e-3)
    assert model.first_s == pytest.approx(real.first_s, rel=1e-3)
    assert model.tpot_s == pytest.approx(real.tpot_s, rel=1e-2)
    shown = figure(calibrated, [level], "here").to_markdown()
    assert "| simulated / live | 1.00 | 1.00 | 1.00 | 1.00 |" in shown
    assert "within 15 %: met." in shown


def test_what_the_client_sent_late_is_simulated_as_late() -> None:
    calibrated = calibrate(measured())
    level = level_of(calibrated)
    # A stall of the client: all of five seconds, at their end and the last one first.
    stalled = tuple(
        replace(each, at_s=20.0 - 1e-3 * each.at_s) if 15.0 <= each.at_s < 20.0 else each
        for each in level.answers
    )
    sent = as_sent(replace(level, answers=stalled))
    assert (np.diff(sent.at_s) >= 0.0).all()
    asked, late = trace(8.0, 3), (sent.at_s > 19.9) & (sent.at_s < 20.0)
    those = (asked.at_s >= 15.0) & (asked.at_s < 20.0)
    assert sent.prompt_tokens[late].tolist() == asked.prompt_tokens[those].tolist()[::-1]
    even, burst = (
        simulated(calibrated, replace(level, answers=a)) for a in (level.answers, stalled)
    )
    assert burst.first_s[1] > 1.1 * even.first_s[1]


def test_a_slower_live_run_misses_the_goal() -> None:
    calibrated = calibrate(measured())
    shown = figure(calibrated, [level_of(calibrated, slower=1.5)], "here").to_markdown()
    assert "within 15 %: missed." in shown


def test_what_was_measured_is_kept_as_it_was() -> None:
    before = measured((Level(8.0, 1, (Answered(0.5, 0.1, 1.0, 20),)),))
    assert from_json(json.loads(json.dumps(asdict(before)))) == before


def test_the_trace_has_the_same_requests_each_time() -> None:
    one, other = trace(8.0, 1), trace(8.0, 1)
    assert np.array_equal(one.at_s, other.at_s)
    assert one.prompt_tokens.max() <= 400
    assert one.output_tokens.min() >= 2


async def answer(request: web.Request) -> web.StreamResponse:
    """As an engine with one token a millisecond; no room for prompts of more than 300 tokens."""
    asked = await request.json()
    if len(asked["prompt"]) > 300:
        return web.json_response({"error": {"message": "too long"}}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(asked["max_tokens"]):
        await asyncio.sleep(0.001)
        await response.write(b'data: {"choices":[{"text":"a"}]}\n\n')
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server:
        yield Target("gateway", (str(server.make_url("")).rstrip("/"),), {})


async def test_a_measurement_has_all_that_was_asked(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "BATCHES": ((1, 4), (3, 8)),
        "PROMPTS": (4, 8),
        "PROMPT_REPEATS": 2,
        "BESIDE_OUTPUT": 20,
        "BATCH_OUTPUT": 10,
        "WARM_UP": 2,
        "LEVELS": (20.0, 40.0),
        "LEVEL_S": 0.5,
        "LONGEST": 30,
        "_SETTLE_S": 0.005,
        "_PAUSE_S": 0.005,
    }.items():
        monkeypatch.setattr(simulator_fidelity, name, value)
    found = await measure(target, "model", (1000, 16), Console(quiet=True))
    assert [(batch.requests, batch.prompt_tokens) for batch in found.batches] == [
        (1, 4),
        (3, 8),
    ] * 4
    assert [first.prompt_tokens for first in found.first_tokens] == [4, 8, 4, 8]
    assert (found.kv_tokens, found.max_seqs) == (1000, 16)
    for level, number in zip(found.levels, (1, 2), strict=True):
        asked = trace(level.requests_per_s, number)
        assert [each.tokens for each in level.answers] == asked.output_tokens.tolist()
        for each, at_s in zip(level.answers, asked.at_s.tolist(), strict=True):
            assert at_s <= each.at_s < at_s + 2.0
            assert 0.001 <= each.first_s < each.total_s
            assert each.tpot_s >= 0.0008


async def test_an_answer_that_is_refused_ends_the_measurement(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator_fidelity, "BATCHES", ((1, 301),))
    with pytest.raises(RuntimeError, match=r"400: .*too long"):
        await measure(target, "model", (1000, 16), Console(quiet=True))
