"""Whether requests met their model's latency targets, and whose usage it was."""

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.gateway.stand import MODEL, Stand, group_of, served_model, standing, until
from tests.mock_rank import Fault

from expertmesh.core.domain.slo import Slo

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "a fox"}],
    "max_tokens": 4,
}
STREAM = {**CHAT, "stream": True}
PATH = "/v1/chat/completions"
EASY = Slo(ttft_s=30.0, tpot_s=30.0)
NO_START = Slo(ttft_s=0.0, tpot_s=30.0)
NO_TOKENS = Slo(ttft_s=30.0, tpot_s=0.0)


def counted(stand: Stand, name: str, label: str) -> dict[str, float]:
    _, text = stand.service.app._metrics.exposition(b"")
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def judged(stand: Stand) -> dict[str, float]:
    return counted(stand, "em_gateway_slo_requests_total", "result")


@pytest.mark.parametrize(
    ("slo", "body", "result"),
    [
        (EASY, STREAM, "met"),
        (EASY, CHAT, "met"),
        (NO_START, STREAM, "slow_start"),
        (NO_TOKENS, STREAM, "slow_tokens"),
        (Slo(ttft_s=0.0, tpot_s=0.0), CHAT, "slow_tokens"),
    ],
)
async def test_an_answer_is_judged_by_its_models_targets(
    stand: Stand, slo: Slo, body: dict[str, Any], result: str
) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank), models=(replace(served_model(), slo=slo),))
    async with stand.post(PATH, body) as response:
        assert response.status == 200
        await response.read()
    await until(lambda: judged(stand))
    assert judged(stand) == {result: 1.0}
    assert list(counted(stand, "em_gateway_tenant_requests_total", "tenant").values()) == [1.0]
    tokens = counted(stand, "em_gateway_tenant_tokens_total", "direction")
    assert tokens["out"] == 4.0 and tokens["in"] > 0


async def test_a_group_that_breaks_off_and_no_room_are_failures(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank), models=(replace(served_model(), slo=EASY),))
    rank.faults.append(Fault("reset", after_events=2))
    async with stand.post(PATH, STREAM) as response:
        await response.text()
    await until(lambda: judged(stand) == {"failed": 1.0})
    await stand.show(models=(replace(served_model(max_wait_s=0.05), slo=EASY),))
    async with stand.post(PATH, CHAT) as response:
        assert response.status in (429, 503)
    await until(lambda: judged(stand) == {"failed": 2.0})


async def test_what_the_client_did_wrong_counts_nowhere() -> None:
    async with standing() as stand:
        rank = await stand.rank()
        await stand.show(group_of(rank), models=(replace(served_model(), slo=EASY),))
        async with stand.post(PATH, {**CHAT, "max_tokens": 10_000_000}) as response:
            assert response.status == 400
        async with stand.post(PATH, {**CHAT, "model": "none"}) as response:
            assert response.status == 404
        assert judged(stand) == {}
