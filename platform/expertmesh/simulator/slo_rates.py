"""What a group really does while it meets the target for time per output token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.simulator.service_time import ServiceTime

Floats = NDArray[np.float64]

KV_SHARE = 0.9
"""Of the KV cache that is filled with requests in their steady state."""


@dataclass(frozen=True, slots=True)
class SloRates:
    """Of one group; arrays when the sizes of the requests were given as arrays.

    A request of I prompt and O output tokens takes `I / prefill + O / decode` seconds of a group
    that is as full as the target allows.
    """

    batch: Floats
    """Requests at once, at least 1."""
    iteration_s: Floats
    """With that batch, and with the prompts that such a batch takes in."""
    prefill_tokens_per_s: Floats
    """Uncached prompt tokens, beside decoding."""
    decode_tokens_per_s: Floats
    """Output tokens, if nothing else were done."""

    def seconds(self, prompt_tokens: Any, output_tokens: Any) -> Floats:
        prefill_s = np.asarray(prompt_tokens) / self.prefill_tokens_per_s
        return np.asarray(prefill_s + np.asarray(output_tokens) / self.decode_tokens_per_s)


def slo_rates(
    service: ServiceTime,
    tpot_s: float,
    prompt_tokens: Any,
    output_tokens: Any,
    output_cv2: float = 1.0,
) -> SloRates:
    """For requests of these mean sizes, which may be arrays (uncached prompt, output).

    A batch of b requests emits b tokens an iteration, ends b / O requests, and takes in the
    b * I / O prompt tokens of those that follow. The batch is the largest whose iteration takes at
    most `tpot_s`, that fits into the cache and into one iteration's tokens. Where even one request
    takes longer, the batch is 1 and `iteration_s` says so. `output_cv2` is `Scenario.output_cv2`.
    """
    prompt = np.asarray(prompt_tokens, dtype=np.float64)
    output = np.maximum(np.asarray(output_tokens, dtype=np.float64), 1.0)
    context = np.maximum(prompt + produced_tokens(output, output_cv2), 1.0)
    tokens = 1 + prompt / output
    decoding_s = service.beta_s + service.gamma_s * context
    per_request_s = decoding_s + service.prompt_token_s * prompt / output
    batch = np.minimum(service.max_seqs, KV_SHARE * service.kv_tokens / context)
    batch = np.minimum(batch, service.max_batched_tokens / tokens)
    batch = np.minimum(batch, (tpot_s - service.alpha_s) / per_request_s)
    batch = np.maximum(batch, 1.0)
    decode_s = service.alpha_s / batch + decoding_s
    return SloRates(
        batch=batch,
        iteration_s=service.alpha_s + batch * per_request_s,
        prefill_tokens_per_s=np.full_like(batch, 1 / service.prompt_token_s),
        decode_tokens_per_s=1 / decode_s,
    )


def produced_tokens(output_tokens: Floats, output_cv2: float) -> Floats:
    """Of a request in the batch, on average: long answers are met more often than short ones."""
    return output_tokens * (1 + output_cv2) / 2
