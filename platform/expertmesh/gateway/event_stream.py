"""Reads a stream of server-sent events while it passes, without taking most events apart."""

from dataclasses import dataclass

from expertmesh.gateway.api import Answer
from expertmesh.gateway.usage import TokenCount, read_usage

# Quotes and line feeds inside a JSON string are escaped, so that no text that a model writes can
# look like one of these or like the beginning of an event.
_USAGE = b'"usage"'
# vLLM writes without spaces, some providers with one after each colon.
_TOLD_USAGE = (b'"usage":{', b'"usage": {')
_NO_CHOICES = (b'"choices":[]', b'"choices": []')
_ROLE = (b'"role":"assistant"', b'"role": "assistant"')
"""Only the first event of a chat completion says it, before any token."""
_COMMENT = b":"
_MOST_EVENT_BYTES = 8 * 1024 * 1024
_ENDLESS = b'{"error":{"message":"sent an event without end"}}'


@dataclass(frozen=True, slots=True)
class _Dialect:
    markers: tuple[bytes, ...]
    """A chunk with none of these holds ordinary events only."""
    last: tuple[bytes, ...]
    """Beginnings of the event that ends a whole stream."""
    error: tuple[bytes, ...]
    preliminary: tuple[bytes, ...]
    """Beginnings of events that come before the model has done anything."""
    token: bytes
    """Occurs once in each event that brings a token, and never inside one."""


_RESPONSES_LAST = (
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: response.failed\n",
)
_DIALECTS = {
    Answer.CHAT: _Dialect(
        markers=(b"data: [DONE]", _USAGE, b'data: {"error"'),
        last=(b"data: [DONE]",),
        error=(b'data: {"error"',),
        preliminary=(_COMMENT,),
        token=b"\n\n",
    ),
    Answer.RESPONSES: _Dialect(
        markers=(*_RESPONSES_LAST, b"event: error\n", b'data: {"error"'),
        last=_RESPONSES_LAST,
        error=(b"event: error\n", b'data: {"error"'),
        preliminary=(
            _COMMENT,
            b"event: response.created\n",
            b"event: response.in_progress\n",
            b"event: response.queued\n",
        ),
        token=b".delta\n",
    ),
    Answer.MESSAGES: _Dialect(
        markers=(b"event: message_", b"event: error\n", b'data: {"error"'),
        last=(b"event: message_stop\n",),
        error=(b"event: error\n", b'data: {"error"'),
        preliminary=(_COMMENT, b"event: ping\n"),
        token=b"event: content_block_delta\n",
    ),
}


class EventStream:
    """Feed it the bytes of one answer; what comes back, whole events only, goes to the client."""

    def __init__(self, answer: Answer, strip_usage: bool) -> None:
        """`strip_usage`: the client did not ask for the usage event, the gateway did."""
        self._dialect = _DIALECTS[answer]
        self._strip_usage = strip_usage
        self._tail = b""
        self._usage_data: list[bytes] = []
        self.tokens_seen = 0
        """Events that brought tokens; the engine may put several tokens into one."""
        self.started = False
        """An event has passed that the model has worked for."""
        self.ended = False
        """The last event has passed: the stream is whole."""
        self.error: bytes | None = None
        """JSON of the error event, which is held back, as is all that follows it."""

    def feed(self, chunk: bytes) -> bytes:
        if self._tail:
            chunk = self._tail + chunk
            self._tail = b""
        if not chunk.endswith(b"\n\n"):
            if b"\r" in chunk:
                chunk = chunk.replace(b"\r\n", b"\n")
            cut = chunk.rfind(b"\n\n") + 2
            if cut == 1:
                if len(chunk) > _MOST_EVENT_BYTES:
                    self.error = _ENDLESS
                else:
                    self._tail = chunk
                return b""
            self._tail = chunk[cut:]
            chunk = chunk[:cut]
        if self.started:
            for marker in self._dialect.markers:
                if marker in chunk:
                    return self._inspect(chunk)
            self.tokens_seen += chunk.count(self._dialect.token)
            return chunk
        return self._inspect(chunk)

    def usage(self) -> TokenCount | None:
        """What the engine has told; None when it has told nothing yet."""
        counts = [count for count in map(read_usage, self._usage_data) if count is not None]
        if not counts:
            return None
        last = counts[-1]
        return TokenCount(
            prompt=max(counts[0].prompt, last.prompt),
            cached=max(counts[0].cached, last.cached),
            completion=last.completion if self.ended else max(last.completion, self.tokens_seen),
        )

    def _inspect(self, chunk: bytes) -> bytes:
        dialect = self._dialect
        passed: list[bytes] = []
        for event in chunk[:-2].split(b"\n\n"):
            if event.startswith(dialect.error):
                self.error = _data(event)
                break
            has_usage = _has(event, _TOLD_USAGE)
            no_choices = has_usage and _has(event, _NO_CHOICES)
            if has_usage:
                self._keep_usage(_data(event))
                if no_choices and self._strip_usage:
                    continue
            passed.append(event)
            if event.startswith(dialect.last):
                self.ended = True
                break
            if event.startswith(dialect.preliminary):
                continue
            self.started = True
            if not no_choices and not _has(event, _ROLE) and dialect.token in event + b"\n\n":
                self.tokens_seen += 1
        return b"\n\n".join(passed) + b"\n\n" if passed else b""

    def _keep_usage(self, data: bytes) -> None:
        """Messages tell the prompt first and the rest last; in between figures only count up."""
        if len(self._usage_data) < 2:
            self._usage_data.append(data)
        else:
            self._usage_data[1] = data


def _has(event: bytes, forms: tuple[bytes, bytes]) -> bool:
    return forms[0] in event or forms[1] in event


def _data(event: bytes) -> bytes:
    for line in event.split(b"\n"):
        if line.startswith(b"data: "):
            return line[6:]
    return b""
