"""How long an engine takes for one iteration of a group: the simulator's own truth."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """With b sequences that decode at a mean context of L tokens, and P prompt tokens beside them,
    an iteration takes `alpha_s + beta_s * (b + P) + gamma_s * b * L`, or with `prompt_s` in place
    of `beta_s` for the P.

    The form is that of llm-d's model of an engine; figures are of a whole group and come from
    measured runs, never from the planner. The ranks of a group share its work evenly.
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
    prompt_s: float | None = None
    """A token of a prompt, where it takes another time than one of a decode step: a prompt lies on
    one rank, and decoding sequences on all of them."""

    prompt_chunk_tokens: int | None = None
    """Most tokens of one prompt in one iteration, which its rank takes; None: as many as the
    iteration has."""

    @property
    def prompt_token_s(self) -> float:
        return self.beta_s if self.prompt_s is None else self.prompt_s

    def iteration_s(self, decoding: float, context_tokens: float, prompt_tokens: float) -> float:
        """`context_tokens` is the sum over the sequences that decode."""
        return (
            self.alpha_s
            + self.beta_s * decoding
            + self.prompt_token_s * prompt_tokens
            + self.gamma_s * context_tokens
        )
