"""Groups and ranks: what runs, where it listens and what it costs.

These values travel as JSON in the exchange between controller and gateways and in the arguments of
a Serve application, so every field is a plain type.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from expertmesh.core.domain.slo import Slo


class GroupState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How one group splits a model. A rank is one data-parallel attention rank."""

    tensor: int
    data: int
    expert: int
    """Experts are split over this many workers; 1 means that each rank holds all of them."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """All that is needed to start one group; the `args` of its Serve application.

    A controller that restarts reads the running groups back from these.
    """

    name: str
    """`em-<model>-<pool>-<n>`; also the name and route prefix of the Serve application."""
    model: str
    model_source: str
    """Local folder or Hugging Face id."""
    pool: str
    parallelism: Parallelism
    max_model_len: int
    usd_per_hour: float
    """Price of all the nodes' shares that the group occupies."""
    accelerator: str | None = None
    """Accelerator type as Ray names it, or None for the CPU engine."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Extra vLLM engine arguments from the manifest."""


@dataclass(frozen=True, slots=True)
class Rank:
    index: int
    base_url: str
    """`http://ip:port/<route prefix>`; append `/v1/...`."""


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    model: str
    pool: str
    state: GroupState
    ranks: tuple[Rank, ...] = ()
    """Addresses of the ranks; complete when the group is ready."""
    world_size: int = 1
    usd_per_hour: float = 0.0
    expected_ready_at_s: float | None = None
    """Unix time, for a group that is starting."""
    message: str = ""
    """Why the group is in this state, for a person, e.g. `pending: no room in pool X`."""


class ExternalUse(StrEnum):
    """When a model's requests may go to an external provider."""

    FALLBACK = "fallback"
    """Only when no group is ready."""
    OVERFLOW = "overflow"
    """Also when the wait for a group is long."""


@dataclass(frozen=True, slots=True)
class ExternalRoute:
    """An OpenAI-compatible provider that may serve a model, priced per token."""

    pool: str
    """A pool of market `external`."""
    base_url: str
    """`https://host/…`; append `/v1/...`."""
    model: str
    """Name of the model there."""
    key_variable: str
    """Environment variable of the gateway that holds the provider's key."""
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float
    use: ExternalUse = ExternalUse.FALLBACK
    overflow_wait_s: float = 10.0
    """With `overflow`: expected wait from which requests go there."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model deployment as the gateway needs to know it, whether or not a group of it runs."""

    name: str
    max_model_len: int
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float
    max_wait_s: float
    aliases: tuple[str, ...] = ()
    """Other names that clients may use for it."""
    external: tuple[ExternalRoute, ...] = ()
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What a group does, over all gateways; sums over its ranks."""

    in_flight: int = 0
    """Requests that gateways have sent and not yet had answered, by their last reports."""
    running: int = 0
    waiting: int = 0
    """Queued inside the engines."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    kv_tokens: int = 0
    """Tokens that fit into the KV cache; 0 when unknown."""
    max_running: int = 0
    """Sequences that the engines batch at most; 0 when unknown."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The controller's answer in the exchange."""

    version: int
    """Grows with every change; a gateway may skip work when it is unchanged."""
    models: tuple[ServedModel, ...] = ()
    groups: tuple[Group, ...] = ()
    loads: dict[str, GroupLoad] = field(default_factory=dict)
    """By group; they change all the time and do not count for the version."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Answer of `GET /em/info` on a rank."""

    group: str
    model: str
    rank: int
    world_size: int
    running: int
    """Requests in the engine's batch."""
    waiting: int
    """Requests queued inside the engine."""
    kv_usage: float
    """Share of the KV cache in use, 0 to 1."""
    kv_tokens: int = 0
    """Tokens that fit into the KV cache; 0 when unknown."""
    max_running: int = 0
    """Sequences that the engine batches at most; 0 when unknown."""
    expert_tokens: dict[str, int] = field(default_factory=dict)
    """Global expert id to tokens routed to it since the start, over all layers; own share only."""
    started_at_s: float = 0.0
    """When this rank's process began to count, by the clock of its node. Another value means
    another process: totals began at 0 again."""
    uncached_prompt_tokens_total: int = 0
    """Prompt tokens that the engine has computed, counted when a prompt is done; what its cache
    held does not count, nor what is computed again after a preemption."""
    output_tokens_total: int = 0
    preemptions_total: int = 0
    """Requests that lost their place in the KV cache to others."""
    cached_prompt_tokens_total: int = 0
    """Prompt tokens that the engine took from its cache."""
    layers: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By layer, of this rank's experts over the last while: tokens of the busiest one, tokens of
    all, and how many experts these are."""
