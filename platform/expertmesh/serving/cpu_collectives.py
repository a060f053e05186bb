"""The collectives of uneven sizes that vLLM's CPU communicator lacks, over gloo; without vLLM."""

import math

import torch
import torch.distributed as dist


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
