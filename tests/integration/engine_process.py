"""A child process of the expert-parallelism tests: runs prompts through engines, writes what came out.

    python engine_process.py JOB.json RESULT.json

A job names a layout, the rank this process plays in it, and models; the result holds, for each
model, the completions of the prompts this rank was given and the expert load it counted. With
filterwarnings and fixtures of pytest out of the way, what crashes here crashes alone.
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
class Job:
    layout: str
    models: dict[str, str]
    """Name to checkpoint directory."""
    prompts: list[list[int]]
    max_tokens: int
    rank: int = 0
    port: int = 0
    """Free port for the rendezvous of several ranks."""
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    """For each position the log-probabilities of the likeliest tokens."""


def engine_arguments(job: Job, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "seed": 0,
        **job.engine,
    }


def sampling(job: Job) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=job.max_tokens, logprobs=5, detokenize=False, ignore_eos=True
    )


def completion(output: Any) -> Completion:
    generated = output.outputs[0]
    return Completion(
        list(output.prompt_token_ids),
        list(generated.token_ids),
        [{token: entry.logprob for token, entry in step.items()} for step in generated.logprobs],
    )


def run_in_process(job: Job, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One engine whose core, and with no other executor asked for its worker, is this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from expertmesh.serving.expert_load import add_loads, loads_from_wire

    llm = LLM(**engine_arguments(job, model), **arguments)
    outputs = llm.generate([{"prompt_token_ids": p} for p in job.prompts], sampling(job), use_tqdm=False)
    loads = llm.collective_rpc("expert_load")
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "completions": [asdict(completion(output)) for output in outputs],
        "load": [asdict(load) for load in add_loads(map(loads_from_wire, loads))],
    }


def single(job: Job, model: str) -> dict[str, Any]:
    return run_in_process(job, model, {})


def tensor_parallel(job: Job, model: str) -> dict[str, Any]:
    """Two workers, each a process of its own, as Ray's LLM layer starts them on CPU."""
    return run_in_process(
        job,
        model,
        {
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "distributed_executor_backend": "mp",
        },
    )


def tensor_rank(job: Job, model: str) -> dict[str, Any]:
    """This process is one of two tensor-parallel ranks that run the same requests in step."""
    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    return run_in_process(
        job,
        model,
        {
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "distributed_executor_backend": "external_launcher",
        },
    )


def data_rank(job: Job, model: str) -> dict[str, Any]:
    """This process is one of two data-parallel ranks, each with prompts of its own."""
    os.environ |= {
        "VLLM_DP_RANK": str(job.rank),
        "VLLM_DP_RANK_LOCAL": str(job.rank),
        "VLLM_DP_SIZE": "2",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(job.port),
    }
    return run_in_process(
        job, model, {"enable_expert_parallel": True, "distributed_executor_backend": "uni"}
    )


def transformers_reference(job: Job, model: str) -> dict[str, Any]:
    """Greedy decoding by transformers, without any cache: the plainest truth there is."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    completions = []
    for prompt in job.prompts:
        tokens: list[int] = []
        logprobs: list[dict[int, float]] = []
        while len(tokens) < job.max_tokens:
            with torch.no_grad():
                logits = network(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            top = torch.log_softmax(logits.float(), dim=-1).topk(5)
            logprobs.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            tokens.append(int(top.indices[0]))
        completions.append(asdict(Completion(prompt, tokens, logprobs)))
    return {"completions": completions, "load": []}


LAYOUTS: dict[str, Callable[[Job, str], dict[str, Any]]] = {
    "single": single,
    "tensor-parallel": tensor_parallel,
    "tensor-rank": tensor_rank,
    "data-rank": data_rank,
    "transformers": transformers_reference,
}


def main(job_file: str, result_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    results = {}
    for name, model in job.models.items():
        started = time.monotonic()
        results[name] = LAYOUTS[job.layout](job, model)
        results[name]["seconds"] = time.monotonic() - started
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
