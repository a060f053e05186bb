"""A child process of the expert-parallelism tests: runs prompts through engines.

    python engine_process.py JOB.json RESULT.json

A job names steps, each a layout to run a model in; the result holds, for each step, completions and
the expert load that was counted. A process of its own, because a broken kernel kills its process.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    layout: str
    model: str
    """Directory of a checkpoint."""
    waves: list[list[tuple[int, list[int]]]]
    """Prompts to send at the same time, each with the data-parallel rank that gets it; a layout
    without ranks gets all of them at once."""
    max_tokens: int
    dtype: str = "float32"
    rank: int = 0
    port: int = 0
    """For the rendezvous of several ranks."""
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt for wave in self.waves for _, prompt in wave]


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    """For each position the log-probabilities of the likeliest tokens."""


def engine_arguments(step: Step, **layout: Any) -> dict[str, Any]:
    return {
        "model": step.model,
        "dtype": step.dtype,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "seed": 0,
        **layout,
        **step.engine,
    }


def sampling(step: Step) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=step.max_tokens, logprobs=5, detokenize=False, ignore_eos=True
    )


def completion(output: Any) -> Completion:
    generated = output.outputs[0]
    return Completion(
        list(output.prompt_token_ids),
        list(generated.token_ids),
        [{token: entry.logprob for token, entry in step.items()} for step in generated.logprobs],
    )


def run_here(step: Step, prompts: list[list[int]], **layout: Any) -> dict[str, Any]:
    """One engine whose core (and worker, unless the layout says otherwise) is this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from expertmesh.serving.expert_load import add_loads, loads_from_wire

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(**engine_arguments(step, **layout))
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], sampling(step), use_tqdm=False
    )
    loads = llm.collective_rpc("expert_load")
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "completions": [asdict(completion(output)) for output in outputs],
        "load": [asdict(load) for load in add_loads(map(loads_from_wire, loads))],
    }


def single(step: Step) -> dict[str, Any]:
    return run_here(step, step.prompts)


def tensor_parallel(step: Step) -> dict[str, Any]:
    """Two workers, each a process of its own, as Ray's LLM layer starts them on CPU."""
    return run_here(
        step,
        step.prompts,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        distributed_executor_backend="mp",
    )


def tensor_rank(step: Step) -> dict[str, Any]:
    """This process is one of two tensor-parallel ranks that run the same requests in step."""
    os.environ |= {
        "RANK": str(step.rank),
        "LOCAL_RANK": str(step.rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(step.port),
    }
    return run_here(
        step,
        step.prompts,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        distributed_executor_backend="external_launcher",
    )


def data_rank(step: Step) -> dict[str, Any]:
    """This process is one of two data-parallel ranks that step together until both are done."""
    os.environ |= {
        "VLLM_DP_RANK": str(step.rank),
        "VLLM_DP_RANK_LOCAL": str(step.rank),
        "VLLM_DP_SIZE": "2",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(step.port),
    }
    prompts = [prompt for wave in step.waves for rank, prompt in wave if rank == step.rank]
    return run_here(step, prompts, enable_expert_parallel=True, distributed_executor_backend="uni")


def data_parallel(step: Step) -> dict[str, Any]:
    """Two engines as Ray's DPServer starts them: each serves one data-parallel rank on its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return asyncio.run(_serve_data_parallel(step))


async def _serve_data_parallel(step: Step) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from expertmesh.serving.expert_load import read_expert_load

    arguments = [
        AsyncEngineArgs(
            **engine_arguments(
                step,
                data_parallel_size=2,
                data_parallel_rank=rank,
                data_parallel_address="127.0.0.1",
                data_parallel_rpc_port=step.port,
                enable_expert_parallel=True,
            )
        )
        for rank in range(2)
    ]
    # Each rank waits for the other while it starts.
    engines = await asyncio.gather(
        *(asyncio.to_thread(AsyncLLM.from_engine_args, rank) for rank in arguments)
    )
    reading_s: dict[str, list[float]] = {"idle": [], "busy": []}

    async def read(rank: int, state: str) -> list[dict[str, Any]]:
        started = time.monotonic()
        load = await read_expert_load(engines[rank], timeout_s=30.0)
        reading_s[state].append(time.monotonic() - started)
        return [asdict(layer) for layer in load]

    async def generate(rank: int, prompt: list[int], request: str) -> Completion:
        outputs = engines[rank].generate({"prompt_token_ids": prompt}, sampling(step), request)
        async for output in outputs:
            last = output
        return completion(last)

    async def watch() -> None:
        while True:
            await asyncio.gather(read(0, "busy"), read(1, "busy"))

    try:
        for _ in range(3):
            idle_load = await asyncio.gather(read(0, "idle"), read(1, "idle"))
        completions = []
        for number, wave in enumerate(step.waves):
            watching = asyncio.create_task(watch())
            completions += await asyncio.gather(
                *(generate(rank, p, f"{number}-{i}") for i, (rank, p) in enumerate(wave))
            )
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        loads = await asyncio.gather(read(0, "idle"), read(1, "idle"))
    finally:
        for engine in engines:
            engine.shutdown()
    return {
        "completions": [asdict(c) for c in completions],
        "idle_load": idle_load,
        "load_by_rank": loads,
        "load": [],
        "reading_s": reading_s,
    }


def reference(step: Step) -> dict[str, Any]:
    """Greedy decoding by transformers without a cache: the plainest truth there is."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        step.model, dtype=getattr(torch, step.dtype)
    )
    completions = []
    for prompt in step.prompts:
        tokens: list[int] = []
        logprobs: list[dict[int, float]] = []
        while len(tokens) < step.max_tokens:
            with torch.no_grad():
                logits = network(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            top = torch.log_softmax(logits.float(), dim=-1).topk(5)
            logprobs.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            tokens.append(int(top.indices[0]))
        completions.append(asdict(Completion(prompt, tokens, logprobs)))
    return {"completions": completions, "load": []}


LAYOUTS: dict[str, Callable[[Step], dict[str, Any]]] = {
    "transformers": reference,
    "single": single,
    "tensor-parallel": tensor_parallel,
    "tensor-rank": tensor_rank,
    "data-rank": data_rank,
    "data-parallel": data_parallel,
}


def main(job_file: str, result_file: str) -> None:
    results = {}
    for entry in json.loads(Path(job_file).read_text()):
        step = Step(**entry)
        started = time.monotonic()
        results[step.name] = LAYOUTS[step.layout](step)
        results[step.name]["seconds"] = time.monotonic() - started
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
