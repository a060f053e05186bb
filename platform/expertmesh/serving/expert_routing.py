"""What a rank does with the router's choice: keep its own experts, count the tokens of requests."""

from typing import Any

import torch
from vllm.forward_context import ForwardContext, get_forward_context

REAL_ROWS = "expertmesh_real_rows"
"""Key in `ForwardContext.additional_kwargs`: which rows gathered from all ranks are of requests."""


def keep_local(
    weights: torch.Tensor, expert_ids: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Global expert ids to local ones; an expert of another rank becomes local expert 0, weight 0.

    weights and expert_ids: [rows, top_k]; expert_map: [experts], -1 where the expert is elsewhere.
    """
    local_ids = expert_map[expert_ids]
    elsewhere = local_ids < 0
    return weights.masked_fill(elsewhere, 0.0), local_ids.masked_fill(elsewhere, 0)


def count_tokens(
    expert_ids: torch.Tensor, real_rows: slice | torch.Tensor, tokens: torch.Tensor
) -> None:
    """Adds the choices of the real rows to tokens: [experts]; expert_ids: [rows, top_k]."""
    tokens += torch.bincount(expert_ids[real_rows].flatten(), minlength=tokens.numel())


def real_local_rows(context: ForwardContext, rows: int, first_row: int = 0) -> slice:
    """Rows of this rank's batch that belong to requests.

    A rank without requests runs a dummy batch, and the engine profiles with one: neither has
    attention metadata. A sequence-parallel rank holds the rows of a padded batch from first_row on.
    """
    metadata: Any = context.attn_metadata
    if not metadata:
        return slice(0, 0)
    actual = getattr(next(iter(metadata.values())), "num_actual_tokens", first_row + rows)
    return slice(0, min(max(actual - first_row, 0), rows))


def define_operator() -> None:
    """Counting as an opaque operator: torch.compile must not trace the forward context, or it would
    freeze what the context held while tracing."""
    if hasattr(torch.ops.expertmesh, "count_tokens"):
        return
    torch.library.define("expertmesh::count_tokens", "(Tensor expert_ids, Tensor(a!) tokens) -> ()")
    torch.library.impl("expertmesh::count_tokens", "CPU", _count_tokens_of_requests)
    torch.library.register_fake("expertmesh::count_tokens", lambda expert_ids, tokens: None)


def _count_tokens_of_requests(expert_ids: torch.Tensor, tokens: torch.Tensor) -> None:
    context = get_forward_context()
    real_rows = context.additional_kwargs.get(REAL_ROWS)
    if real_rows is None:
        real_rows = real_local_rows(context, expert_ids.shape[0])
    count_tokens(expert_ids, real_rows, tokens)
