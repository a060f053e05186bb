"""Token counts out of the answers of the three protocols."""

import msgspec


class TokenCount(msgspec.Struct, frozen=True, gc=False):
    prompt: int
    """All tokens of the prompt, those from the cache included."""
    cached: int
    completion: int


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    # chat completions, completions, embeddings
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    # responses and messages
    input_tokens: int | None = None
    output_tokens: int | None = None
    # responses: input_tokens includes the cached ones
    input_tokens_details: _Details | None = None
    # messages: input_tokens excludes these two
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Nested(msgspec.Struct):
    usage: _Usage | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None
    response: _Nested | None = None
    """In the last event of responses."""
    message: _Nested | str | None = None
    """In the first event of messages."""


_MOST_TOKENS = 2**40
_decode = msgspec.json.Decoder(_Answer).decode


def read_usage(data: bytes) -> TokenCount | None:
    """`data` is the JSON of a whole answer or of one event."""
    try:
        answer = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    usage = answer.usage
    if usage is None and answer.response is not None:
        usage = answer.response.usage
    if usage is None and isinstance(answer.message, _Nested):
        usage = answer.message.usage
    return None if usage is None else _count(usage)


def _count(usage: _Usage) -> TokenCount:
    if usage.prompt_tokens is not None:
        details = usage.prompt_tokens_details
        prompt = usage.prompt_tokens
        cached = details.cached_tokens if details is not None else None
        completion = usage.completion_tokens
    else:
        prompt = usage.input_tokens or 0
        completion = usage.output_tokens
        if usage.input_tokens_details is not None:
            cached = usage.input_tokens_details.cached_tokens
        else:
            cached = usage.cache_read_input_tokens
            prompt += (cached or 0) + (usage.cache_creation_input_tokens or 0)
    prompt = _sane(prompt)
    return TokenCount(prompt, min(_sane(cached or 0), prompt), _sane(completion or 0))


def _sane(tokens: int) -> int:
    """No rank may write what the ledger cannot hold."""
    return max(0, min(tokens, _MOST_TOKENS))


class PromptSizes:
    """Guesses the tokens of a prompt from the bytes of its request, as learnt from answered ones.

    Used for load figures before a request runs, and for the ledger when a stream broke before the
    engine told.
    """

    _FIRST_GUESS_BYTES_PER_TOKEN = 4.0
    _WEIGHT = 0.05

    def __init__(self) -> None:
        self._bytes_per_token: dict[str, float] = {}

    def guess(self, model: str, size_bytes: int, most: int) -> int:
        ratio = self._bytes_per_token.get(model, self._FIRST_GUESS_BYTES_PER_TOKEN)
        return max(1, min(most, round(size_bytes / ratio)))

    def learn(self, model: str, size_bytes: int, prompt_tokens: int) -> None:
        if prompt_tokens > 0:
            seen = size_bytes / prompt_tokens
            known = self._bytes_per_token.get(model, seen)
            self._bytes_per_token[model] = known + self._WEIGHT * (seen - known)
