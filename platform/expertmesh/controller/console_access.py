"""Who may see the console's data: those with the mesh token, an admin key, or a link of `up`.

The page gives the secret away once and gets a session for it: a signed text that only opens the
console, ends by itself, and that every controller of the same mesh token understands.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from expertmesh.core.domain.mesh_token import MeshToken

SESSION_S = 12 * 3600.0
TICKET_S = 600.0
_SESSION = "ems1"
_TICKET = "emt1"
_MESH = "mesh"
_KEY_PREFIX = "sk-em-"
_LONGEST = 4096
_SKEW_S = 2.0


class AdminKeys(Protocol):
    """The store's keys; raises UpstreamUnavailable."""

    async def admin_id(self, secret: str, now_s: float) -> str | None:
        """Of an active admin key; None for any other secret."""
        ...

    async def is_admin(self, key_id: str, now_s: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Session:
    text: str
    expires_at_s: float


class ConsoleAccess:
    def __init__(self, mesh_token: str, keys: AdminKeys | None, now_s: Callable[[], float]) -> None:
        """`now_s`: Unix time. Without `keys` only the mesh token and its tickets count."""
        self._token = mesh_token
        self._mesh = MeshToken(mesh_token)
        self._keys = keys
        self._now_s = now_s
        self._began_at_s = now_s()
        self._used: dict[str, float] = {}
        """Tickets that have been used, and when they end."""

    async def enter(self, secret: str) -> Session | None:
        """For the mesh token, an active admin key, or a ticket that has not been used."""
        subject = await self._subject(secret.strip()[:_LONGEST])
        if subject is None:
            return None
        expires_at_s = self._now_s() + SESSION_S
        return Session(_signed(self._token, _SESSION, subject, expires_at_s), expires_at_s)

    async def admits(self, credential: str) -> bool:
        """A session of this mesh token that has not ended, or the mesh token itself."""
        if self._mesh.admits(_bytes(credential)):
            return True
        found = _read(self._token, _SESSION, credential[:_LONGEST])
        if found is None or found.expires_at_s <= self._now_s():
            return False
        if found.subject == _MESH:
            return True
        return self._keys is not None and await self._keys.is_admin(found.subject, self._now_s())

    async def _subject(self, secret: str) -> str | None:
        if self._mesh.admits(_bytes(secret)):
            return _MESH
        if secret.startswith(_KEY_PREFIX) and self._keys is not None:
            return await self._keys.admin_id(secret, self._now_s())
        return _MESH if self._takes(secret) else None

    def _takes(self, ticket: str) -> bool:
        now_s = self._now_s()
        self._used = {text: until_s for text, until_s in self._used.items() if until_s > now_s}
        found = _read(self._token, _TICKET, ticket)
        if found is None or not now_s < found.expires_at_s <= now_s + TICKET_S + _SKEW_S:
            return False
        # An earlier process may have taken it, and its memory is gone.
        if found.expires_at_s - TICKET_S < self._began_at_s - _SKEW_S or ticket in self._used:
            return False
        self._used[ticket] = found.expires_at_s
        return True


def console_ticket(mesh_token: str, now_s: float) -> str:
    """Opens the console once, within ten minutes, at a controller that runs already."""
    return _signed(mesh_token, _TICKET, _MESH, now_s + TICKET_S)


def console_link(controller_url: str, mesh_token: str, now_s: float) -> str:
    """The ticket is in the fragment, which browsers send to no server."""
    return f"{controller_url}/console/#ticket={console_ticket(mesh_token, now_s)}"


@dataclass(frozen=True, slots=True)
class _Signed:
    subject: str
    expires_at_s: float


def _signed(mesh_token: str, kind: str, subject: str, expires_at_s: float) -> str:
    text = f"{kind}.{subject}.{int(expires_at_s * 1000)}.{secrets.token_hex(8)}"
    return f"{text}.{_mac(mesh_token, text)}"


def _read(mesh_token: str, kind: str, given: str) -> _Signed | None:
    text, _, mac = given.rpartition(".")
    if not _same(mac, _mac(mesh_token, text)):
        return None
    found, subject, expires_at_ms, _ = text.split(".")
    return _Signed(subject, int(expires_at_ms) / 1000) if found == kind else None


def _mac(mesh_token: str, text: str) -> str:
    key = hmac.digest(mesh_token.encode(), b"expertmesh console", hashlib.sha256)
    return hmac.new(key, _bytes(text), hashlib.sha256).hexdigest()


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(_bytes(given), wanted.encode())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
