"""Service times of DeepSeek-V3 on H200 for the simulator, fitted to published rates.

    python -m benchmarks.gpu_service_times           # the fit, and the service times
    python -m benchmarks.gpu_service_times --write   # and write them to service_times.yaml

No published row is of an H200. It computes and exchanges like an H100 or H800 and differs in its
memory, so the rows of those are taken and what memory does is counted rather than fitted: in every
step each GPU reads its share of the experts' weights at the full bandwidth, and the caches of its
sequences at 80 % of it. That share is also what sets EP8, EP16 and EP32 apart. Fitted are the fixed
time of a step and the time of a token.

A prompt's token takes as long as a decoded one, since one engine does both in one batch: that is
what DeepSeek's production prefill does over a day, about half of what engines reach that do nothing
but prefill.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from benchmarks.planner_accuracy import DATA

from expertmesh.simulator.fitting import Fit, MeasuredIteration, fit_iterations
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.spec.catalog_hardware import accelerators

FILE = Path(__file__).with_name("service_times.yaml")
ROWS = (
    "V3 production, prefill EP32",
    "V3 production, decode EP144",
    "V3 profile, decode EP128",
    "V3, decode EP72",
)
ACCELERATOR = "H200"
GROUP_SIZES = (8, 16, 32)

EXPERT_BYTES = 58 * 256 * 44.04e6
"""58 layers of 256 experts, FP8."""
OTHER_BYTES = 671.0e9 - EXPERT_BYTES + 2 * 129_280 * 7168
"""On every GPU, as attention is data-parallel; embeddings in BF16."""
CACHE_BYTES_PER_TOKEN = 61 * 576 * 2
"""61 layers of a latent of 576 values, BF16."""
CACHE_BANDWIDTH_SHARE = 0.8
MEMORY_SHARE = 0.9
BUFFER_BYTES = 8e9
"""Of activations and exchanges."""
SEQS_PER_GPU = 256
BATCHED_TOKENS_PER_GPU = 1024
"""So that a step with prompts takes about 0.25 s at most."""


@dataclass(frozen=True, slots=True)
class Published:
    label: str
    iteration: MeasuredIteration
    tokens_per_s: float
    """Of one GPU."""


def published() -> tuple[Published, ...]:
    rows = {row["label"]: row for row in yaml.safe_load(DATA.read_text())["rows"]}
    return tuple(_published(rows[label]) for label in ROWS)


def _published(row: Mapping[str, Any]) -> Published:
    bandwidth = accelerators()[row["accelerator"]].memory_bytes_per_s
    expert_s = EXPERT_BYTES / row["layout"]["expert"] / bandwidth
    rate = float(row["published"])
    if row["phase"] == "prefill":
        tokens = float(row["tokens_per_rank"])
        iteration = MeasuredIteration(0, 0, tokens, tokens / rate, expert_s)
    else:
        batch, context = float(row["batch_per_rank"]), float(row["context"])
        cache_s = batch * context * cache_s_per_token(bandwidth)
        # The context is among what is known, so there is nothing of it to fit.
        iteration = MeasuredIteration(batch, 0, 0, batch / rate, expert_s + cache_s)
    return Published(row["label"], iteration, rate)


def cache_s_per_token(memory_bytes_per_s: float) -> float:
    return CACHE_BYTES_PER_TOKEN / (CACHE_BANDWIDTH_SHARE * memory_bytes_per_s)


def fit() -> Fit:
    return fit_iterations([row.iteration for row in published()])


def service_time(gpus: int, fitted: Fit) -> ServiceTime:
    """Of one group, whose GPUs share its sequences evenly."""
    accelerator = accelerators()[ACCELERATOR]
    bandwidth = accelerator.memory_bytes_per_s
    used_bytes = EXPERT_BYTES / gpus + OTHER_BYTES + BUFFER_BYTES
    free_bytes = MEMORY_SHARE * accelerator.memory_bytes - used_bytes
    return ServiceTime(
        alpha_s=fitted.alpha_s + EXPERT_BYTES / gpus / bandwidth,
        beta_s=fitted.beta_s / gpus,
        gamma_s=cache_s_per_token(bandwidth) / gpus,
        kv_tokens=int(free_bytes / CACHE_BYTES_PER_TOKEN) * gpus,
        max_seqs=SEQS_PER_GPU * gpus,
        max_batched_tokens=BATCHED_TOKENS_PER_GPU * gpus,
    )


def service_times() -> dict[str, ServiceTime]:
    fitted = fit()
    return {
        f"DeepSeek-V3 EP{gpus} {ACCELERATOR}": service_time(gpus, fitted) for gpus in GROUP_SIZES
    }


def as_yaml(times: Mapping[str, ServiceTime]) -> str:
    head = (
        "# Written by `python -m benchmarks.gpu_service_times --write`, which says how.\n"
        "# Each is the `service` of an option in a scenario file.\n"
    )
    rounded = {
        name: {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in asdict(time).items()
            if value is not None
        }
        for name, time in times.items()
    }
    return head + yaml.safe_dump(rounded, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write the service times to their file"
    )
    arguments = parser.parse_args()
    fitted = fit()
    print(f"A step takes {1e3 * fitted.alpha_s:.1f} ms and {1e3 * fitted.beta_s:.3f} ms a token.")
    for row, error in zip(published(), fitted.errors, strict=True):
        print(
            f"{row.label:28} published {row.tokens_per_s:5.0f} tok/s a GPU, "
            f"fitted {row.tokens_per_s / (1 + error):5.0f}"
        )
    text = as_yaml(service_times())
    print(f"\n{text}")
    if arguments.write:
        FILE.write_text(text)


if __name__ == "__main__":
    main()
