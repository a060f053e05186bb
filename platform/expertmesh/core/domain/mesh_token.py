"""The secret that controller, gateways and ranks share; two while it is replaced.

`new,old` holds two. Two processes trust each other when they have one in common, so that a secret
is replaced in two steps without a moment in which a part of the mesh is shut out: first all get
both, then all get the new one only.
"""

import hmac

_MOST = 4
"""A header full of guesses is no more than a few."""


class MeshToken:
    def __init__(self, text: str) -> None:
        self._tokens = _split(text.encode())
        if not self._tokens:
            raise ValueError("a mesh token must not be empty")

    def admits(self, given: bytes) -> bool:
        """Whether one of those given is one of these."""
        found = [
            hmac.compare_digest(one, own) for one in _split(given)[:_MOST] for own in self._tokens
        ]
        return any(found)


def _split(text: bytes) -> list[bytes]:
    return [token for part in text.split(b",") if (token := part.strip())]
