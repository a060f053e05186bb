from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.simulator.small import ENGINE

from expertmesh.simulator.slo_rates import slo_rates


def test_the_batch_is_the_largest_that_meets_the_target() -> None:
    slow = replace(ENGINE, alpha_s=0.02, gamma_s=1e-7, max_seqs=10_000)
    rates = slo_rates(slow, 0.05, 500, 400)
    assert rates.iteration_s == pytest.approx(0.05)
    b = float(rates.batch)
    prompts = b * 500 / 400
    assert slow.iteration_s(b, b * 900, prompts) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({"max_seqs": 64}, 64),
        ({"kv_tokens": 90_000}, 90),
        ({"max_batched_tokens": 225, "max_seqs": 4096}, 100),
    ],
)
def test_sequences_cache_and_tokens_of_an_iteration_limit_it(
    changes: dict[str, int], batch: float
) -> None:
    assert slo_rates(replace(ENGINE, **changes), 0.05, 500, 400).batch == pytest.approx(batch)


def test_a_target_that_nothing_meets_leaves_one_request_and_says_how_slow_it_is() -> None:
    rates = slo_rates(ENGINE, 0.005, 500, 400)
    assert rates.batch == 1
    assert rates.iteration_s > 0.01


def test_work_is_what_a_full_group_takes_for_it() -> None:
    rates = slo_rates(ENGINE, 0.05, 500, 400)
    per_second = rates.batch / (400 * rates.iteration_s)
    assert rates.seconds(500, 400) == pytest.approx(1 / per_second)


@given(st.floats(0, 20_000), st.floats(1, 5_000), st.floats(0.02, 0.2))
def test_arrays_give_what_single_values_give(prompt: float, output: float, tpot_s: float) -> None:
    one = slo_rates(ENGINE, tpot_s, prompt, output)
    many = slo_rates(ENGINE, tpot_s, np.array([1.0, prompt]), np.array([1.0, output]))
    assert many.batch[1] == one.batch
    assert many.decode_tokens_per_s[1] == one.decode_tokens_per_s
    assert one.seconds(prompt, output) * one.batch == pytest.approx(
        max(output, 1) * float(one.iteration_s)
    )


def test_long_answers_fill_the_batch_with_context() -> None:
    slow = replace(ENGINE, gamma_s=1e-7, max_seqs=10_000)
    even, wide = (slo_rates(slow, 0.05, 500, 400, cv2) for cv2 in (0.0, 3.0))
    assert (even.iteration_s, wide.iteration_s) == pytest.approx((0.05, 0.05))
    b = float(wide.batch)
    assert slow.iteration_s(b, b * 1300, b * 1.25) == pytest.approx(0.05)
    assert wide.batch < even.batch


def test_a_token_of_a_prompt_may_take_another_time() -> None:
    dear = replace(ENGINE, max_seqs=10_000, prompt_s=5e-5)
    rates = slo_rates(dear, 0.05, 500, 400)
    b = float(rates.batch)
    assert dear.iteration_s(b, b * 900, b * 1.25) == pytest.approx(0.05)
    assert rates.prefill_tokens_per_s == pytest.approx(1 / 5e-5)
    assert rates.batch < slo_rates(replace(dear, prompt_s=None), 0.05, 500, 400).batch
