from collections.abc import Collection, Mapping

import pytest
from tests.core.routing.fleets import model, route

from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse
from expertmesh.core.routing.candidate import Candidate, external_candidates
from expertmesh.core.routing.external import (
    ExternalAsk,
    ExternalChoice,
    ExternalConfig,
    choose_external,
)

OVERFLOW = ExternalUse.OVERFLOW
CHAT = ExternalAsk("chat_completions", 1000, 500, ready=True)
ASLEEP = ExternalAsk("chat_completions", 1000, 500, ready=False)


def choice(
    ask: ExternalAsk,
    *routes: ExternalRoute,
    config: ExternalConfig | None = None,
    ejected: Collection[str] = (),
    in_flight: Mapping[str, int] | None = None,
    tried: Collection[str] = (),
) -> ExternalChoice:
    served = model(external=routes)

    def usable(candidate: Candidate) -> bool:
        return candidate.pool not in ejected

    return choose_external(
        config or ExternalConfig(),
        served,
        [one for one in external_candidates(served) if one.pool not in tried],
        ask,
        usable,
        lambda candidate: (in_flight or {}).get(candidate.pool, 0),
    )


def pool(chosen: ExternalChoice) -> str | None:
    return None if chosen.candidate is None else chosen.candidate.pool


def asked(
    endpoint: str = "chat_completions",
    ready: bool = True,
    wait_s: float = 0.0,
    failed: bool = False,
    prompt_tokens: int = 1000,
    completion_tokens: int = 500,
) -> ExternalAsk:
    return ExternalAsk(endpoint, prompt_tokens, completion_tokens, ready, wait_s, failed)


def test_a_model_that_allows_no_provider_stays() -> None:
    chosen = choice(ASLEEP)
    assert pool(chosen) is None and "allows no external provider" in chosen.why


@pytest.mark.parametrize("use", ExternalUse)
def test_fallback_when_no_group_is_ready_or_the_groups_failed(use: ExternalUse) -> None:
    east = route("east", use=use)
    chosen = choice(ASLEEP, east)
    assert chosen.candidate == Candidate("east", "east", 0, "https://east", 1, east)
    assert chosen.why == (
        "no group of 'm' is ready: east is the cheapest at $0.001500 for this request"
    )
    chosen = choice(asked(failed=True), east)
    assert pool(chosen) == "east" and chosen.why.startswith("the groups of 'm' failed")


def test_a_ready_group_keeps_its_requests() -> None:
    chosen = choice(asked(wait_s=1e9), route("east"))
    assert pool(chosen) is None and "soon enough" in chosen.why


def test_overflow_from_the_routes_own_wait_on() -> None:
    soon = route("soon", 9.0, use=OVERFLOW, overflow_wait_s=5.0)
    late = route("late", 1.0, use=OVERFLOW, overflow_wait_s=20.0)
    never = route("never", 0.1)
    waits = {4.99: None, 5.0: "soon", 19.9: "soon", 20.0: "late"}
    for wait_s, expected in waits.items():
        assert pool(choice(asked(wait_s=wait_s), soon, late, never)) == expected, wait_s
    assert choice(asked(wait_s=5.0), soon).why.startswith("the wait for 'm' is 5.0 s: soon")


def test_the_cheapest_for_the_tokens_of_the_request() -> None:
    reads, writes = route("reads", 1.0, 10.0), route("writes", 5.0, 2.0)
    long_prompt = asked(ready=False, prompt_tokens=10_000, completion_tokens=10)
    long_answer = asked(ready=False, prompt_tokens=10, completion_tokens=10_000)
    for routes in ((reads, writes), (writes, reads)):
        assert pool(choice(long_prompt, *routes)) == "reads"
        assert pool(choice(long_answer, *routes)) == "writes"
    assert pool(choice(ASLEEP, route("one"), route("two"))) == "one", "of equals the first"


def test_who_is_ejected_or_busy_is_passed_over_and_named() -> None:
    routes = (route("cheap", 1.0), route("busy", 2.0), route("dear", 3.0))
    config = ExternalConfig(max_in_flight=4)
    chosen = choice(ASLEEP, *routes, config=config, ejected={"cheap"}, in_flight={"busy": 4})
    assert pool(chosen) == "dear"
    assert "cheap is ejected or busy; busy has 4 requests under way" in chosen.why
    chosen = choice(ASLEEP, *routes, config=config, in_flight={"cheap": 3})
    assert pool(chosen) == "cheap"
    chosen = choice(ASLEEP, *routes, ejected={"cheap", "busy", "dear"})
    assert pool(chosen) is None and "no external provider can take it" in chosen.why


def test_an_overflow_must_not_be_too_dear_but_a_fallback_may() -> None:
    # The tariff is $2 and $4 per million tokens: $0.004 for this request.
    config = ExternalConfig(overflow_price_ratio=1.0)
    fair, dear = route("fair", 2.0, 4.0, OVERFLOW), route("dear", 2.0, 4.1, OVERFLOW)
    assert pool(choice(asked(wait_s=10.0), fair, config=config)) == "fair"
    chosen = choice(asked(wait_s=10.0), dear, config=config)
    assert pool(chosen) is None and "dear is too dear at $0.004050" in chosen.why
    assert pool(choice(asked(wait_s=10.0), dear)) == "dear"
    assert pool(choice(ASLEEP, dear, config=config)) == "dear"


@pytest.mark.parametrize(
    ("endpoint", "goes"),
    [
        ("chat_completions", True),
        ("completions", True),
        ("embeddings", True),
        ("responses", False),
        ("messages", False),
        ("count_tokens", False),
        ("tokenize", False),
        ("detokenize", False),
    ],
)
def test_only_what_providers_share_goes_there(endpoint: str, goes: bool) -> None:
    for ask in (asked(endpoint, ready=False), asked(endpoint, failed=True)):
        chosen = choice(ask, route("east"))
        assert (pool(chosen) == "east") is goes
        assert goes or "do not offer this endpoint" in chosen.why


def test_when_all_have_been_tried() -> None:
    chosen = choice(ASLEEP, route("east"), tried={"east"})
    assert pool(chosen) is None and chosen.why == "all external providers of 'm' have been tried"
