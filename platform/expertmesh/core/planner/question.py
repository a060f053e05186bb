"""What a plan is asked for: a model in the formats on offer, a pool, targets and an aim."""

from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.layout import Layout


class Objective(StrEnum):
    CHEAPEST = "cheapest"
    """Least money for a token of output, at the targets and a full group."""
    SMALLEST = "smallest"
    """Fewest GPUs that meet the targets."""
    FASTEST = "fastest"
    """Least time between two tokens of a user who is alone on a rank."""


class Serving(StrEnum):
    TOGETHER = "together"
    """A group reads prompts and writes answers: what ExpertMesh starts."""
    APART = "apart"
    """Some groups only read prompts, and hand their caches to others that only write."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in one format."""

    source: str
    """Folder or Hugging Face id."""
    shape: ModelShape


@dataclass(frozen=True, slots=True)
class GpuPool:
    name: str
    accelerator: Accelerator
    gpus_per_node: int
    max_nodes: int
    usd_per_gpu_hour: float
    market: str
    price_note: str = ""
    """Who asks that price, and when it was seen."""

    @property
    def max_gpus(self) -> int:
        return self.gpus_per_node * self.max_nodes


@dataclass(frozen=True, slots=True)
class Targets:
    """Latencies are means, as the model of steps predicts them."""

    context_tokens: int
    """Longest that a sequence may get."""
    input_tokens: int
    """Of a usual request."""
    output_tokens: int
    ttft_s: float
    tpot_s: float
    users: int | None = None
    """Requests at the same time to serve; None to fill one group."""
    spare_groups: int = 0
    """Groups that may fail while all `users` are still served."""


@dataclass(frozen=True, slots=True)
class Question:
    checkpoints: tuple[Checkpoint, ...]
    targets: Targets
    objective: Objective = Objective.CHEAPEST
    serving: frozenset[Serving] = frozenset({Serving.TOGETHER})
    """What may win; the other is only compared with."""
    kv: Dtype = Dtype.BF16
    """Of the cache."""
    only: tuple[Layout, str, int | None] | None = None
    """The one `Candidate.key` to rate; None for all."""
