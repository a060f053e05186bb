"""vLLM's CPU communicator, completed so that data-parallel ranks can share experts."""

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context

from expertmesh.serving.cpu_collectives import all_gather_rows, reduce_scatter_rows
from expertmesh.serving.expert_routing import REAL_ROWS, real_local_rows


class ExpertCommunicator(CpuCommunicator):
    """Has what `AgRsAll2AllManager` calls."""

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        if dim != 0:
            raise NotImplementedError(f"all_gatherv on CPU gathers along dim 0, not {dim}")
        tensors = [input_] if isinstance(input_, torch.Tensor) else list(input_)
        gathered = all_gather_rows(
            tensors, sizes or [tensors[0].shape[0]] * self.world_size, self.device_group
        )
        return gathered[0] if isinstance(input_, torch.Tensor) else gathered

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        rows_first = input_.movedim(dim, 0)
        sizes = sizes or [rows_first.shape[0] // self.world_size] * self.world_size
        own_rows = sizes[self.rank_in_group]
        reduced = reduce_scatter_rows(rows_first, sizes, own_rows, self.device_group)
        return reduced.movedim(0, dim).contiguous()

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Also tells the other ranks which rows are of requests: they cannot know which of the
        tokens they are sent come from the dummy batch of an idle rank."""
        context = get_forward_context()
        rows = hidden_states.shape[0]
        first_row = get_tp_group().rank_in_group * rows if is_sequence_parallel else 0
        real_rows = torch.zeros(rows, dtype=torch.bool)
        real_rows[real_local_rows(context, rows, first_row)] = True
        hidden_states, router_logits, (real_rows, *extra) = super().dispatch_router_logits(
            hidden_states, router_logits, is_sequence_parallel, [real_rows, *(extra_tensors or [])]
        )
        context.additional_kwargs[REAL_ROWS] = real_rows
        if extra_tensors is None:
            return hidden_states, router_logits
        return hidden_states, router_logits, extra
