"""Whether an external provider takes a request, which one, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse, ServedModel
from expertmesh.core.routing.candidate import Candidate

# What providers share is this part of OpenAI's API; the rest is our engines' own.
EXTERNAL_ENDPOINTS = frozenset(("chat_completions", "completions", "embeddings"))


@dataclass(frozen=True, slots=True)
class ExternalConfig:
    max_in_flight: int = 64
    """Requests under way at one provider, of this worker."""
    overflow_price_ratio: float | None = None
    """An overflow costs at most so many times what the tariff brings in; None for any price. A
    fallback is not bound by it: without it there is no answer."""


@dataclass(frozen=True, slots=True)
class ExternalAsk:
    """A request, and how it stands with the model's own groups."""

    endpoint: str
    """Name as in metrics, e.g. `chat_completions`."""
    prompt_tokens: int
    """Estimated."""
    completion_tokens: int
    """At most."""
    ready: bool
    """The model has a ready group."""
    expected_wait_s: float = 0.0
    """For a slot in a ready group."""
    groups_failed: bool = False
    """The groups have failed this request, and no attempt with them is left."""


@dataclass(frozen=True, slots=True)
class ExternalChoice:
    candidate: Candidate | None
    """None: the request stays with the model's groups."""
    why: str
    """For a person."""


NO_PROVIDER = ExternalChoice(None, "the model's manifest allows no external provider")
_NOT_OFFERED = ExternalChoice(None, "external providers do not offer this endpoint")
_NOT_NEEDED = ExternalChoice(None, "the model's own groups take it soon enough")


def choose_external(
    config: ExternalConfig,
    model: ServedModel,
    candidates: Sequence[Candidate],
    ask: ExternalAsk,
    usable: Callable[[Candidate], bool],
    in_flight: Callable[[Candidate], int],
) -> ExternalChoice:
    """The cheapest provider for the request's tokens among those that may take it now.

    `candidates` are the model's external ones that this request has not tried yet; `usable` says
    that a provider is neither ejected nor busy.
    """
    if not model.external:
        return NO_PROVIDER
    if ask.endpoint not in EXTERNAL_ENDPOINTS:
        return _NOT_OFFERED
    fallback = ask.groups_failed or not ask.ready
    best: Candidate | None = None
    best_usd = 0.0
    passed_over: list[str] = []
    wanted = False
    for candidate in candidates:
        route = candidate.external
        if route is None or not (fallback or _overflows(route, ask.expected_wait_s)):
            continue
        wanted = True
        usd = _usd(route, ask)
        if not usable(candidate):
            passed_over.append(f"{candidate.pool} is ejected or busy")
        elif in_flight(candidate) >= config.max_in_flight:
            passed_over.append(f"{candidate.pool} has {config.max_in_flight} requests under way")
        elif not fallback and _too_dear(config, usd, model, ask):
            passed_over.append(f"{candidate.pool} is too dear at ${usd:.6f}")
        elif best is None or usd < best_usd:
            best, best_usd = candidate, usd
    if not wanted:
        if not fallback:
            return _NOT_NEEDED
        return ExternalChoice(None, f"all external providers of '{model.name}' have been tried")
    notes = f" ({'; '.join(passed_over)})" if passed_over else ""
    cause = _cause(model, ask)
    if best is None:
        return ExternalChoice(None, f"{cause}, but no external provider can take it{notes}")
    return ExternalChoice(
        best, f"{cause}: {best.pool} is the cheapest at ${best_usd:.6f} for this request{notes}"
    )


def _overflows(route: ExternalRoute, expected_wait_s: float) -> bool:
    return route.use is ExternalUse.OVERFLOW and expected_wait_s >= route.overflow_wait_s


def _usd(tariff: ExternalRoute | ServedModel, ask: ExternalAsk) -> float:
    """An estimate to compare by; nobody is charged by it."""
    return (
        tariff.usd_per_mtok_in * ask.prompt_tokens + tariff.usd_per_mtok_out * ask.completion_tokens
    ) / 1e6


def _too_dear(config: ExternalConfig, usd: float, model: ServedModel, ask: ExternalAsk) -> bool:
    ratio = config.overflow_price_ratio
    return ratio is not None and usd > ratio * _usd(model, ask)


def _cause(model: ServedModel, ask: ExternalAsk) -> str:
    if ask.groups_failed:
        return f"the groups of '{model.name}' failed"
    if not ask.ready:
        return f"no group of '{model.name}' is ready"
    return f"the wait for '{model.name}' is {ask.expected_wait_s:.1f} s"
