"""The collectives of uneven sizes, between two real gloo processes."""

import multiprocessing
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertmesh.serving.cpu_collectives import all_gather_rows, reduce_scatter_rows

SIZES = {"even": [3, 3], "uneven": [1, 5], "none on rank 1": [4, 0], "none on rank 0": [0, 2]}


def gather_inputs(rank: int, rows: int) -> list[torch.Tensor]:
    """Tensors of each kind that a dispatch may send; one of them not contiguous."""
    generator = torch.Generator().manual_seed(rank)
    states = torch.randn(rows, 5, generator=generator)
    return [
        states,
        states[:, :3].to(torch.bfloat16),
        torch.arange(rows * 4, dtype=torch.int32).reshape(rows, 2, 2) + 100 * rank,
        states[:, 0] > 0,
        states.t().contiguous().t(),
    ]


def reduce_input(rank: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(10 + rank))


def run_rank(rank: int, port: int, pipe: Connection) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.group.WORLD
    for sizes in SIZES.values():
        gathered = all_gather_rows(gather_inputs(rank, sizes[rank]), sizes, group)
        reduced = reduce_scatter_rows(reduce_input(rank, sum(sizes)), sizes, sizes[rank], group)
        pipe.send(([tensor.tolist() for tensor in gathered], reduced.tolist()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, list[Any]]]:
    """For each case what the two ranks got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=run_rank, args=(rank, port, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for _, sender in pipes:
        sender.close()
    try:
        yield {case: [receiver.recv() for receiver, _ in pipes] for case in SIZES}
    finally:
        for rank in ranks:
            rank.join(30)
        alive = [rank.pid for rank in ranks if rank.is_alive()]
        for rank in ranks:
            rank.kill()
    assert not alive, f"processes left: {alive}"


@pytest.mark.parametrize("case", SIZES)
def test_every_rank_gets_the_rows_of_all(case: str, outcomes: dict[str, list[Any]]) -> None:
    of_ranks = [gather_inputs(rank, rows) for rank, rows in enumerate(SIZES[case])]
    expected = [torch.cat(tensors).tolist() for tensors in zip(*of_ranks, strict=True)]
    for gathered, _ in outcomes[case]:
        assert gathered == expected


@pytest.mark.parametrize("case", SIZES)
def test_every_rank_gets_its_rows_of_the_sum(case: str, outcomes: dict[str, list[Any]]) -> None:
    sizes = SIZES[case]
    expected = (reduce_input(0, sum(sizes)) + reduce_input(1, sum(sizes))).split(sizes)
    for rank, (_, reduced) in enumerate(outcomes[case]):
        assert reduced == expected[rank].tolist()
