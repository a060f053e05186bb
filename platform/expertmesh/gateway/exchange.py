"""Report up, fleet down, once a second."""

import asyncio
import logging
import time

import aiohttp
import msgspec

from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway.admission import Admission
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.limits import GatewayLimits

_log = logging.getLogger(__name__)

_decode_fleet = msgspec.json.Decoder(Fleet).decode


class Exchange:
    """Keeps the last fleet while the controller does not answer."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        controller_url: str,
        mesh_token: str,
        gateway: str,
        view: FleetView,
        admission: Admission,
        limits: GatewayLimits,
        wake: asyncio.Event,
    ) -> None:
        """`gateway` names this worker, uniquely for each start. `wake` is set when something must
        be told at once."""
        self._http = http
        self._url = controller_url.rstrip("/") + "/v1/exchange"
        self._headers = {
            "Authorization": f"Bearer {mesh_token}",
            "Content-Type": "application/json",
        }
        self._gateway = gateway
        self._view = view
        self._admission = admission
        self._wake = wake
        self._timeout = aiohttp.ClientTimeout(total=limits.exchange_timeout_s)
        self._period_s = limits.exchange_period_s
        self._failing = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            await self.once()
            # A slow answer must not delay the next report further; a lost second is not caught up.
            next_s = max(next_s + self._period_s, loop.time())
            try:
                async with asyncio.timeout(next_s - loop.time()):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def once(self) -> None:
        try:
            fleet = await self._exchange()
        except UpstreamUnavailable as error:
            if not self._failing:
                _log.warning("exchange: %s; keeping the last fleet", error)
            self._failing = True
            return
        if self._failing:
            _log.info("exchange: the controller answers again")
        self._failing = False
        self._view.apply(fleet)
        self._admission.fleet_changed()

    def report(self) -> GatewayReport:
        return GatewayReport(
            gateway=self._gateway,
            sent_at_s=time.time(),
            models=self._admission.traffic(),
            groups={
                name: GroupTraffic(
                    in_flight=count.in_flight,
                    tokens_in_flight=count.tokens_in_flight,
                    requests_total=count.requests,
                    errors_total=count.errors,
                    ttft_s_sum=count.ttft_s_sum,
                    ttft_count=count.ttft_count,
                    tpot_s_sum=count.tpot_s_sum,
                    tpot_count=count.tpot_count,
                )
                for name, count in self._view.reported().items()
            },
            fleet_version=self._view.fleet.version if self._view.fleet is not None else 0,
        )

    async def _exchange(self) -> Fleet:
        body = msgspec.json.encode(self.report())
        try:
            async with self._http.post(
                self._url, data=body, headers=self._headers, timeout=self._timeout
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise UpstreamUnavailable(
                f"{self._url}: {str(error) or type(error).__name__}"
            ) from error
        if response.status != 200:
            raise UpstreamUnavailable(f"{self._url}: answered with status {response.status}")
        try:
            return _decode_fleet(answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UpstreamUnavailable(f"{self._url}: sent no fleet: {error}") from error
