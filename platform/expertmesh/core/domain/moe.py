"""The facts about a mixture-of-experts model that placement needs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoeShape:
    architecture: str
    experts: int
    """Routed experts per MoE layer."""
    experts_per_token: int
    layers: int
    max_position_embeddings: int
