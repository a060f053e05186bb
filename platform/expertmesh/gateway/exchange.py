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
from expertmesh.gateway.controllers import ControllerUrls
from expertmesh.gateway.fleet_view import FleetView
from expertmesh.gateway.limits import GatewayLimits

_log = logging.getLogger(__name__)

_decode_fleet = msgspec.json.Decoder(Fleet).decode


class _NotLeader(UpstreamUnavailable):
    def __init__(self, asked: str, leader: str) -> None:
        super().__init__(f"{asked}: follows {leader}")
        self.leader = leader


class _Starting(UpstreamUnavailable):
    """It will lead, and needs the reports until it does."""


class Exchange:
    """Keeps the last fleet while no controller answers as the leader."""

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
        """`controller_url`: one, or several with commas between. `gateway` names this worker,
        uniquely for each start. `wake` is set when something must be told at once."""
        self._http = http
        self._controllers = ControllerUrls(controller_url.split(","))
        self._headers = {
            "Authorization": f"Bearer {mesh_token}",
            "Content-Type": "application/json",
        }
        self._gateway = gateway
        self._view = view
        self._admission = admission
        self._wake = wake
        self._timeout = aiohttp.ClientTimeout(total=limits.exchange_timeout_s)
        self._patience_s = limits.exchange_timeout_s
        self._period_s = limits.exchange_period_s
        self._failing = False
        self._reports = 0

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
        self._reports += 1
        return GatewayReport(
            gateway=self._gateway,
            sent_at_s=time.time(),
            number=self._reports,
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
        controllers = self._controllers
        controllers.begin()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._patience_s
        while True:
            problem: UpstreamUnavailable
            try:
                return await self._ask(controllers.current, body)
            except _Starting:
                raise
            except _NotLeader as error:
                known, problem = controllers.follows(error.leader), error
            except UpstreamUnavailable as error:
                known, problem = controllers.failed(), error
            # One that does not answer costs its time: the next one is then asked next time.
            if not known or loop.time() >= until_s:
                raise problem

    async def _ask(self, controller: str, body: bytes) -> Fleet:
        url = f"{controller}/v1/exchange"
        try:
            async with self._http.post(
                url, data=body, headers=self._headers, timeout=self._timeout
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise UpstreamUnavailable(f"{url}: {str(error) or type(error).__name__}") from error
        if response.status != 200:
            raise _refusal(url, response.status, answer)
        try:
            return _decode_fleet(answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UpstreamUnavailable(f"{url}: sent no fleet: {error}") from error


def _refusal(url: str, status: int, answer: bytes) -> UpstreamUnavailable:
    shown = f"{url}: answered with status {status}"
    try:
        error = msgspec.json.decode(answer)["error"]
        if error["code"] == "not_leader":
            return _NotLeader(url, str(error["leader"]))
        if error["code"] == "starting":
            return _Starting(f"{shown}: it starts")
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        pass
    return UpstreamUnavailable(shown)
