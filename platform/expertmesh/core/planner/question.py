"""What a plan is asked for: a model in the formats on offer, a pool, targets and an aim."""

from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.rates import ATTAINMENT
from expertmesh.core.planner.balance import ExpertLoad


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
    """For requests of the usual length: nothing is known of how lengths vary."""

    context_tokens: int
    """Longest that a sequence may get."""
    input_tokens: int
    """Of a usual request."""
    output_tokens: int
    ttft_s: float
    """For the share `attainment` of requests, with their wait for others' prompts."""
    tpot_s: float
    """Mean: over the hundreds of tokens of an answer, steps even out."""
    users: int | None = None
    """Requests at the same time to serve; None to fill one group."""
    spare_groups: int = 0
    """Groups that may fail while all `users` are still served."""
    attainment: float = ATTAINMENT
    sequences_per_rank: int | None = None
    """Most that somebody lets an attention rank run at once; None for vLLM's default."""


@dataclass(frozen=True, slots=True)
class Question:
    checkpoints: tuple[Checkpoint, ...]
    targets: Targets
    objective: Objective = Objective.CHEAPEST
    serving: frozenset[Serving] = frozenset({Serving.TOGETHER})
    """What may win; the other is only compared with."""
    kv: Dtype = Dtype.BF16
    """Of the cache."""
    expert_load: ExpertLoad | None = None
    """Measured; None for the usual power law."""
