"""What one model's requests have asked for and taken since this worker started."""


class ModelCount:
    """Counted on the hot path: integers only."""

    __slots__ = (
        "arrivals",
        "arrived_prompt_tokens",
        "external_output_tokens",
        "external_prompt_tokens",
        "external_requests",
        "finished",
        "output_tokens",
        "queued_prompt_tokens",
        "uncached_prompt_tokens",
    )

    def __init__(self) -> None:
        self.arrivals = 0
        self.arrived_prompt_tokens = 0
        """As guessed."""
        self.queued_prompt_tokens = 0
        """Of those that wait now, as guessed."""
        self.finished = 0
        """Answered by groups, as are the tokens that follow."""
        self.uncached_prompt_tokens = 0
        self.output_tokens = 0
        self.external_requests = 0
        """Answered by providers."""
        self.external_prompt_tokens = 0
        self.external_output_tokens = 0
