"""The collectives of uneven sizes that vLLM's CPU communicator lacks, over gloo."""

import math

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context

from expertmesh.serving.expert_routing import REAL_ROWS, real_local_rows


def all_gather_rows(
    tensors: list[torch.Tensor], sizes: list[int], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Rows of all ranks, in rank order, of each tensor; sizes: how many rows each rank has.

    All tensors travel as bytes in one collective, padded to the longest rank: for the few rows of a
    decode step, latency is all that counts.
    """
    rows, longest, world_size = tensors[0].shape[0], max(sizes), len(sizes)
    parts = [
        tensor.reshape(rows, math.prod(tensor.shape[1:])).contiguous().view(torch.uint8)
        for tensor in tensors
    ]
    widths = [part.shape[1] for part in parts]
    sent = parts[0].new_empty((longest, sum(widths)))
    torch.cat(parts, dim=1, out=sent[:rows])
    received = sent.new_empty((world_size * longest, sum(widths)))
    dist.all_gather_single(received, sent, group=group)
    if any(size != longest for size in sizes):
        received = torch.cat(
            [block[:size] for block, size in zip(received.split(longest), sizes, strict=True)]
        )
    return [
        part.contiguous().view(tensor.dtype).reshape(sum(sizes), *tensor.shape[1:])
        for part, tensor in zip(received.split(widths, dim=1), tensors, strict=True)
    ]


def reduce_scatter_rows(
    tensor: torch.Tensor, sizes: list[int], own_rows: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's rows of the sum over ranks; sizes: how many rows go to each rank.

    Each rank receives its rows from all others and adds them in rank order, so that every rank adds
    alike and nothing is sent that nobody needs.
    """
    world_size = len(sizes)
    received = tensor.new_empty((world_size * own_rows, *tensor.shape[1:]))
    dist.all_to_all_single(
        received,
        tensor.contiguous(),
        output_split_sizes=[own_rows] * world_size,
        input_split_sizes=sizes,
        group=group,
    )
    return received.view(world_size, own_rows, *tensor.shape[1:]).sum(dim=0)


class ExpertCommunicator(CpuCommunicator):
    """vLLM's CPU communicator, able to carry `AgRsAll2AllManager`."""

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
