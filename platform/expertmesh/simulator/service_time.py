"""How long an engine takes for one iteration of a group: the simulator's own truth."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """With b sequences that decode at a mean context of L tokens, and P prompt tokens beside them,
    an iteration takes `alpha_s + beta_s * (b + P) + gamma_s * b * L`.

    The form is that of llm-d's model of an engine; figures are of a whole group and come from
    measured runs, never from the planner.
    """

    alpha_s: float
    beta_s: float
    """A token, of a prompt or of a decode step."""
    gamma_s: float
    """A sequence and token of context."""
    kv_tokens: int
    """That fit into the cache of the whole group."""
    max_seqs: int
    """Sequences in a batch, over all ranks."""
    max_batched_tokens: int
    """Tokens of one iteration, over all ranks."""

    def iteration_s(self, decoding: float, context_tokens: float, prompt_tokens: float) -> float:
        """`context_tokens` is the sum over the sequences that decode."""
        return (
            self.alpha_s + self.beta_s * (decoding + prompt_tokens) + self.gamma_s * context_tokens
        )
