"""Which pages of other hosts may call the gateway from a browser: none unless named."""

from typing import Final

_ALL: Final = "*"
_PREFLIGHT: Final = (
    b"access-control-allow-methods: GET, POST, OPTIONS\r\n"
    b"access-control-allow-headers: authorization, content-type, x-api-key, x-request-id, "
    b"x-session-id, traceparent, tracestate, anthropic-version, anthropic-beta, "
    b"anthropic-dangerous-direct-browser-access, openai-beta, openai-organization, "
    b"openai-project, x-stainless-arch, x-stainless-helper, x-stainless-helper-method, "
    b"x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-read-timeout, "
    b"x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, "
    b"x-stainless-timeout\r\n"
    b"access-control-max-age: 600\r\n"
)


class Cors:
    def __init__(self, origins: tuple[str, ...] = ()) -> None:
        """Origins as browsers send them, e.g. `https://chat.example`, or `*`."""
        self._all: Final = _ALL in origins
        self._origins: Final = frozenset(origin.encode() for origin in origins)

    def lines(self, origin: bytes) -> bytes:
        """Header lines of an answer; none when the page may not read it."""
        if not self._all and origin not in self._origins:
            return b""
        return (
            b"access-control-allow-origin: %b\r\nvary: origin\r\n"
            b"access-control-expose-headers: x-request-id, request-id, retry-after, "
            b"x-should-retry, x-em-cost-usd, x-em-dropped-reason, x-ratelimit-limit-requests, "
            b"x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, "
            b"x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, "
            b"x-ratelimit-reset-tokens\r\n"
        ) % (b"*" if self._all else origin)

    def preflight(self, origin: bytes) -> bytes:
        """Of the answer to the question that browsers ask first; none: it is not allowed."""
        return _PREFLIGHT if self._all or origin in self._origins else b""
