"""Asks ejected ranks whether they are back."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp

from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.router import Router
from expertmesh.gateway.limits import GatewayLimits

_PERIOD_S: Final = 0.1


class Prober:
    def __init__(
        self,
        http: aiohttp.ClientSession,
        router: Router,
        mesh_token: str,
        environment: Mapping[str, str],
        limits: GatewayLimits,
        found: Callable[[], None],
        now_s: Callable[[], float],
    ) -> None:
        """`found` is called when a rank is back. `now_s` is a monotonic clock."""
        self._http: Final = http
        self._router: Final = router
        self._mesh_token: Final = mesh_token
        self._environment: Final = environment
        self._timeout: Final = aiohttp.ClientTimeout(total=limits.probe_timeout_s)
        self._found: Final = found
        self._now_s: Final = now_s
        self._probes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(_PERIOD_S)
                for candidate in self._router.due_probes(self._now_s()):
                    probe = asyncio.create_task(self._probe(candidate))
                    self._probes.add(probe)
                    probe.add_done_callback(self._probes.discard)
        finally:
            for probe in self._probes:
                probe.cancel()

    async def _probe(self, candidate: Candidate) -> None:
        url, headers = self._question(candidate)
        try:
            async with self._http.get(url, headers=headers, timeout=self._timeout) as answer:
                sound = answer.status < 400
        except (aiohttp.ClientError, OSError, TimeoutError):
            sound = False
        if sound:
            self._router.health.probe_ok(candidate.base_url)
            self._found()
        else:
            self._router.health.probe_failed(candidate.base_url, self._now_s())

    def _question(self, candidate: Candidate) -> tuple[str, dict[str, str]]:
        base_url = candidate.base_url.rstrip("/")
        if candidate.external is None:
            return f"{base_url}/em/info", {"X-EM-Mesh-Token": self._mesh_token}
        key = self._environment.get(candidate.external.key_variable, "")
        return f"{base_url}/v1/models", {"Authorization": f"Bearer {key}"}
