from dataclasses import replace
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh.simulator.engine import Engine, Sequence
from expertmesh.simulator.service_time import ServiceTime

SERVICE = ServiceTime(
    alpha_s=0.01,
    beta_s=1e-5,
    gamma_s=1e-7,
    kv_tokens=10_000,
    max_seqs=16,
    max_batched_tokens=1000,
)
EVEN = ServiceTime(0.01, 0.0, 0.0, 4000, 16, 1000, 0.0)
"""All iterations take the same."""
APART_S = 1.2345e-4
AT_ONCE_S = 1e-9
"""Times that differ by less are the same but for rounding."""


def run(service: ServiceTime, sequences: list[Sequence]) -> list[tuple[int, float]]:
    """Submits them at their arrivals, before a step at the same time; index, time of each end."""
    engine = Engine(service)
    ends: list[tuple[int, float]] = []
    coming = list(sequences)
    while coming or engine.next_s < inf:
        if coming and coming[0].arrived_at_s <= engine.next_s + AT_ONCE_S:
            sequence = coming.pop(0)
            engine.submit(sequence, min(sequence.arrived_at_s, engine.next_s))
            continue
        at_s = engine.next_s
        ends += [(sequence.index, at_s) for sequence in engine.step()]
        assert engine.next_s >= at_s
        assert 0 <= engine.kv_used_tokens <= service.kv_tokens
    assert engine.in_flight == 0
    assert engine.kv_used_tokens == 0
    return ends


def one_by_one(
    service: ServiceTime,
    sequences: list[tuple[float, int, int, int]],
    iterations_s: list[float] | None = None,
) -> dict[int, tuple[float, float]]:
    """The same engine written as plainly as can be, an iteration at a time.

    Times of the first token and of the end by index; the end of each iteration is added to
    `iterations_s`.
    """
    most = service.prompt_chunk_tokens or service.max_batched_tokens
    now_s, coming = 0.0, list(enumerate(sequences))
    waiting: list[dict[str, int]] = []
    running: list[dict[str, int]] = []
    first: dict[int, float] = {}
    times: dict[int, tuple[float, float]] = {}
    while coming or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, coming[0][1][0])
        while coming and coming[0][1][0] <= now_s + AT_ONCE_S:
            index, (_, prompt, output, cached) = coming.pop(0)
            waiting.append(
                {"i": index, "prompt": prompt, "output": output, "cached": cached, "out": 0}
            )

        def held() -> int:
            return sum(each["prompt"] + each["out"] for each in running)

        preempted = False
        while held() + sum(not r["need"] for r in running) > service.kv_tokens:
            waiting.insert(0, running.pop())
            preempted = True
        decoding = [each for each in running if not each["need"]]
        left = service.max_batched_tokens - len(decoding)
        chunks: list[tuple[dict[str, int], int]] = []
        for each in running:
            if each["need"] and left > 0:
                chunks.append((each, min(left, each["need"], most)))
                left -= chunks[-1][1]
        while waiting and left > 0 and not preempted and len(running) < service.max_seqs:
            head = waiting[0]
            need = head["prompt"] + head["out"]
            if running and held() + len(decoding) + need > service.kv_tokens:
                break
            running.append(waiting.pop(0))
            head["need"] = need - head["cached"]
            chunks.append((head, min(left, head["need"], most)))
            left -= chunks[-1][1]
        now_s += service.iteration_s(
            len(decoding),
            sum(each["prompt"] + each["out"] for each in decoding),
            sum(tokens for _, tokens in chunks),
        )
        if iterations_s is not None:
            iterations_s.append(now_s)
        for each, tokens in chunks:
            each["need"] -= tokens
        for each in decoding + [each for each, _ in chunks if not each["need"]]:
            each["out"] += 1
            first.setdefault(each["i"], now_s)
            if each["out"] >= each["output"]:
                running.remove(each)
                times[each["i"]] = (first[each["i"]], now_s)
    return times


requests = st.lists(
    st.tuples(
        st.floats(0.0, 3.0) | st.integers(0, 300).map(lambda hundredths: hundredths / 100),
        st.integers(1, 3000),
        st.integers(1, 300),
        st.integers(0, 500),
    ),
    min_size=1,
    max_size=40,
)
many = settings(deadline=None, max_examples=150)
services = st.builds(
    ServiceTime,
    st.just(0.01),
    st.sampled_from([0.0, 1e-5]),
    st.sampled_from([0.0, 1e-7]),
    st.sampled_from([3300, 4000, 10_000]),
    st.sampled_from([3, 16]),
    st.just(1000),
    st.sampled_from([None, 3e-5]),
    st.sampled_from([None, 100, 400]),
)


def apart(requests: list[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """Never at the same time as one another: the first would begin alone."""
    return [
        (at_s + place * APART_S, p, o, min(c, p - 1))
        for place, (at_s, p, o, c) in enumerate(sorted(requests))
    ]


def assert_same(
    service: ServiceTime,
    requests: list[tuple[float, int, int, int]],
) -> None:
    requests = sorted(requests)
    sequences = [Sequence(i, at_s, p, o, c) for i, (at_s, p, o, c) in enumerate(requests)]
    ends = dict(run(service, sequences))
    plain = one_by_one(service, requests)
    for sequence in sequences:
        first_s, end_s = plain[sequence.index]
        assert sequence.first_token_at_s == pytest.approx(first_s, abs=1e-6)
        assert ends[sequence.index] == pytest.approx(end_s, abs=1e-6)


@many
@given(requests, services)
# The last one arrives with the end of an iteration, in the middle of many that are alike.
@example([(0.0, 1, 30, 0), (0.1 - APART_S, 1, 1, 0)], EVEN)
@example([(0.0, 2500, 1, 0), (0.05 - APART_S, 1, 1, 0)], replace(EVEN, prompt_chunk_tokens=100))
def test_it_is_the_same_as_one_iteration_after_the_other(
    requests: list[tuple[float, int, int, int]],
    service: ServiceTime,
) -> None:
    assert_same(service, apart(requests))


@many
@given(requests, services, st.data())
def test_what_arrives_as_an_iteration_ends_is_in_the_next(
    requests: list[tuple[float, int, int, int]],
    service: ServiceTime,
    data: st.DataObject,
) -> None:
    requests = apart(requests)
    ends_s: list[float] = []
    one_by_one(service, requests, ends_s)
    at_s = data.draw(st.sampled_from(ends_s)) + data.draw(st.sampled_from([0.0, 1e-13, -1e-13]))
    assert_same(service, [*requests, (at_s, data.draw(st.integers(1, 500)), 3, 0)])


def test_a_lone_request_takes_its_prefill_and_its_steps() -> None:
    sequence = Sequence(0, 5.0, 500, 3)
    [(_, end_s)] = run(SERVICE, [sequence])
    assert sequence.first_token_at_s == pytest.approx(5.0 + 0.01 + 500 * 1e-5)
    step_s = 0.01 + 1e-5
    assert end_s == pytest.approx(sequence.first_token_at_s + 2 * step_s + 1e-7 * (501 + 502))


def test_a_long_prompt_is_computed_in_chunks() -> None:
    sequence = Sequence(0, 0.0, 2500, 1)
    [(_, end_s)] = run(SERVICE, [sequence])
    assert end_s == pytest.approx(3 * 0.01 + 2500 * 1e-5)


def test_a_prompt_gets_no_more_than_its_chunk_and_others_the_rest() -> None:
    service = replace(SERVICE, prompt_chunk_tokens=400)
    long, short = Sequence(0, 0.0, 1000, 1), Sequence(1, 0.001, 300, 1)
    ends = dict(run(service, [long, short]))
    first_s = 0.01 + 400e-5
    assert ends[1] == pytest.approx(first_s + 0.01 + 700e-5)
    assert ends[0] == pytest.approx(ends[1] + 0.01 + 200e-5)


def test_cached_tokens_cost_no_time_but_room() -> None:
    sequence = Sequence(0, 0.0, 2000, 1, cached_tokens=1500)
    engine = Engine(SERVICE)
    engine.submit(sequence, 0.0)
    assert engine.kv_used_tokens == 2000
    assert engine.next_s == pytest.approx(0.01 + 500 * 1e-5)
    assert engine.step() == [sequence]
    assert engine.prompt_tokens == 500


def test_prefill_slows_down_what_decodes() -> None:
    alone = run(SERVICE, [Sequence(0, 0.0, 10, 100)])[0][1]
    beside = dict(run(SERVICE, [Sequence(0, 0.0, 10, 100), Sequence(1, 0.5, 900, 1)]))[0]
    assert beside == pytest.approx(alone + 900 * 1e-5, rel=1e-3)


def test_no_more_than_the_batch_holds() -> None:
    service = ServiceTime(0.01, 0.0, 0.0, 10_000, 2, 1000)
    ends = dict(run(service, [Sequence(i, 0.0, 10, 10) for i in range(4)]))
    assert ends[0] == pytest.approx(0.10)
    assert ends[3] > 0.2 - 1e-9


def test_what_does_not_fit_into_the_cache_waits() -> None:
    engine = Engine(SERVICE)
    engine.submit(Sequence(0, 0.0, 6000, 100), 0.0)
    engine.submit(Sequence(1, 0.0, 6000, 100), 0.0)
    for _ in range(10):
        engine.step()
        if not engine.waiting:
            break
        assert engine.in_flight == 2
        assert engine.waiting == 1
    assert engine.in_flight == 1


def test_the_last_admitted_is_preempted_when_the_cache_is_full() -> None:
    service = ServiceTime(0.01, 0.0, 0.0, 200, 16, 1000)
    first, second = Sequence(0, 0.0, 50, 100), Sequence(1, 0.0, 50, 100)
    ends = dict(run(service, [first, second]))
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert ends[0] < ends[1]
    assert second.first_token_at_s < 0.05


def test_progress_counts_what_is_under_way() -> None:
    engine = Engine(ServiceTime(0.01, 0.0, 0.0, 10_000, 16, 1000))
    sequence = Sequence(0, 0.0, 100, 101)
    engine.submit(sequence, 0.0)
    assert engine.progress(0.005) == (50.0, 0.0)
    engine.step()
    assert engine.progress(0.01) == (100.0, 1.0)
    assert engine.progress(0.51)[1] == pytest.approx(51.0)
    assert engine.produced(sequence, 0.515) == 51


def test_an_end_of_the_engine_gives_back_what_was_in_flight() -> None:
    engine = Engine(SERVICE)
    sequences = [Sequence(i, 0.0, 4000, 50) for i in range(4)]
    for sequence in sequences:
        engine.submit(sequence, 0.0)
    engine.step()
    assert engine.abort(engine.next_s) == sequences
    assert engine.next_s == inf
    assert engine.in_flight == 0
    assert engine.kv_used_tokens == 0


def test_longer_than_the_cache_never_fits() -> None:
    engine = Engine(SERVICE)
    assert engine.fits(Sequence(0, 0.0, 9_000, 1000))
    assert not engine.fits(Sequence(0, 0.0, 9_001, 1000))


def test_an_arrival_between_two_iterations_is_not_noticed_later() -> None:
    engine = Engine(SERVICE)
    engine.submit(Sequence(0, 0.0, 10, 1000), 0.0)
    engine.step()
    before_s = engine.next_s
    assert before_s > 9.0
    assert engine.submit(Sequence(1, 1.0, 10, 10), 1.0)
    assert 1.0 <= engine.next_s <= 1.0 + 0.0103
    assert not engine.submit(Sequence(2, 1.001, 10, 10), 1.001)
