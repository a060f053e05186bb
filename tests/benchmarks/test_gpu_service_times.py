"""Service times that are called published must give the published rates again."""

import pytest
import yaml
from benchmarks import gpu_service_times
from benchmarks.gpu_service_times import EXPERT_BYTES, FILE, as_yaml, published, service_times

from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.slo_rates import slo_rates


def test_the_fit_gives_the_published_rates() -> None:
    fitted = gpu_service_times.fit()
    rows = published()
    assert len(rows) == 4
    for row in rows:
        step = row.iteration
        tokens = step.decoding + step.prompt_tokens
        took_s = step.known_s + fitted.alpha_s + fitted.beta_s * tokens
        assert tokens / took_s == pytest.approx(row.tokens_per_s, rel=0.06), row.label


def test_at_the_time_per_token_of_a_row_the_group_does_what_the_row_says() -> None:
    """With the memory of its own GPU and group size, through the rates that policies are graded
    by."""
    fitted = gpu_service_times.fit()
    for row in published():
        step = row.iteration
        if not step.decoding:
            continue
        service = ServiceTime(
            fitted.alpha_s + step.known_s, fitted.beta_s, 0.0, 10**12, 100_000, 100_000
        )
        rates = slo_rates(service, step.took_s, 1e-9, 1000.0)
        assert float(rates.decode_tokens_per_s) == pytest.approx(row.tokens_per_s, rel=0.1)


def test_vllm_reaches_about_as_much_on_h200_as_the_group_of_32() -> None:
    """2,200 tokens a second and GPU, which its authors published for wide expert parallelism; it is
    not among the rows of the fit."""
    service = service_times()["DeepSeek-V3 EP32 H200"]
    rates = slo_rates(service, 0.05, 1e-9, 4000.0)
    assert float(rates.decode_tokens_per_s) / 32 == pytest.approx(2200, rel=0.15)


def test_a_larger_group_reads_fewer_weights_and_keeps_more_context_a_gpu() -> None:
    eight, sixteen, thirty_two = service_times().values()
    assert eight.alpha_s - sixteen.alpha_s == pytest.approx(EXPERT_BYTES / 16 / 4.8e12, rel=0.01)
    assert eight.alpha_s > sixteen.alpha_s > thirty_two.alpha_s
    assert eight.kv_tokens / 8 < sixteen.kv_tokens / 16 < thirty_two.kv_tokens / 32
    assert eight.kv_tokens > 8 * 128_000


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == as_yaml(service_times())
    loaded = yaml.safe_load(FILE.read_text())
    assert [ServiceTime(**each).max_seqs for each in loaded.values()] == [2048, 4096, 8192]


def test_groups_of_the_typical_reasoning_request() -> None:
    """Output tokens a second of EP8, EP16 and EP32 with 1268 prompt and 1527 output tokens."""
    found = []
    for service in service_times().values():
        rates = slo_rates(service, 0.05, 1268.0, 1527.0)
        found.append(1527.0 / float(rates.seconds(1268.0, 1527.0)))
    assert found == pytest.approx([7_000, 19_500, 44_500], rel=0.08)
