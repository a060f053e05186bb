"""Over real HTTP on the loopback address."""

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.test_utils import TestServer
from tests.controller.running_system import RunningSystem

from expertmesh.controller.api import build_api
from expertmesh.core.domain.fleet import Fleet, GroupState
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic

TOKEN = "the mesh token"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
REPORT = GatewayReport(
    "host-1-2",
    1.0,
    models={"tiny": ModelTraffic(queued_requests=3)},
    groups={"em-tiny-cheap-1": GroupTraffic(in_flight=2)},
)

Call = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
async def system() -> RunningSystem:
    system = RunningSystem()
    await system.pass_s(13)
    return system


@pytest.fixture
async def call(system: RunningSystem) -> AsyncIterator[Call]:
    server = TestServer(build_api(system.controller, TOKEN))
    await server.start_server()
    async with aiohttp.ClientSession() as http:

        async def call(
            method: str, path: str, body: Any = None, headers: dict[str, str] = AUTH
        ) -> tuple[int, Any]:
            data = msgspec.json.encode(body) if isinstance(body, GatewayReport | dict) else body
            url = server.make_url(path)
            async with http.request(method, url, data=data, headers=headers) as response:
                text = await response.read()
                is_json = response.content_type == "application/json"
                return response.status, msgspec.json.decode(text) if is_json else text.decode()

        yield call
    await server.close()


async def test_the_exchange_takes_a_report_and_answers_the_fleet(
    system: RunningSystem, call: Call
) -> None:
    status, body = await call("POST", "/v1/exchange", REPORT)
    assert status == 200
    fleet = msgspec.convert(body, Fleet)
    assert fleet == system.controller.fleet
    assert fleet.groups[0].state is GroupState.READY
    assert fleet.loads["em-tiny-cheap-1"].in_flight == 2
    await system.controller.turn()
    assert system.controller.summaries()["tiny"]["queued"] == 3
    assert system.controller.summaries()["tiny"]["running"] == 2


async def test_a_report_of_a_newer_gateway_may_say_more(call: Call) -> None:
    body = {**msgspec.to_builtins(REPORT), "something_new": {"a": 1}}
    assert (await call("POST", "/v1/exchange", body))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no header"),
        pytest.param({"Authorization": "Bearer wrong"}, id="wrong token"),
        pytest.param({"Authorization": f"Basic {TOKEN}"}, id="wrong scheme"),
        pytest.param({"Authorization": TOKEN}, id="no scheme"),
        pytest.param({"Authorization": "Bearer "}, id="empty token"),
        pytest.param({"Authorization": "Bearer t\u00f6ken"}, id="not ASCII"),
        pytest.param({"X-EM-Mesh-Token": TOKEN}, id="the ranks' header"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/exchange"),
        ("GET", "/v1/fleet"),
        ("GET", "/v1/decisions"),
        ("GET", "/v1/decisions/1"),
        ("GET", "/metrics"),
        ("GET", "/no/such/path"),
        ("DELETE", "/v1/fleet"),
    ],
)
async def test_everything_but_health_wants_the_token(
    call: Call, headers: dict[str, str], method: str, path: str
) -> None:
    status, body = await call(method, path, REPORT, headers=headers)
    assert status == 401
    assert body["error"]["code"] == "mesh_token_required"


async def test_health_needs_no_token(call: Call) -> None:
    assert await call("GET", "/healthz", headers={}) == (200, {"status": "ok"})
    assert await call("GET", "/readyz", headers={}) == (200, {"status": "ready"})


async def test_readiness_names_the_failing_steps_and_their_errors_only_with_the_token(
    system: RunningSystem, call: Call
) -> None:
    system.serve.is_down = True
    await system.pass_s(3)
    status, body = await call("GET", "/readyz", headers={})
    assert status == 503
    assert body["failing"] == ["observe applications", "observe nodes"]
    status, body = await call("GET", "/readyz")
    assert body["failing"]["observe nodes"] == "failed 3 times in a row: GET: no answer"


async def test_a_loop_that_stands_still_is_not_healthy(system: RunningSystem, call: Call) -> None:
    system.clock.now_s += 121
    assert (await call("GET", "/healthz", headers={}))[0] == 503


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"", "no JSON", id="empty"),
        pytest.param(b"{", "no JSON", id="cut off"),
        pytest.param(b"\xff\xfe", "no JSON", id="not text"),
        pytest.param(b"[]", "Expected `object`", id="an array"),
        pytest.param(b'{"gateway": "g"}', "sent_at_s", id="a field is missing"),
        pytest.param({"gateway": 1, "sent_at_s": 1.0}, "$.gateway", id="a wrong type"),
        pytest.param({"gateway": "", "sent_at_s": 1.0}, "1 to 200 characters", id="no name"),
        pytest.param({"gateway": "g" * 201, "sent_at_s": 1.0}, "1 to 200 c", id="a long name"),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "models": {"m": {"queued_requests": -1}}},
            "models.m.queued_requests: -1 is negative",
            id="a negative count",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "fleet_version": -1},
            "fleet_version: -1 is negative",
            id="a negative version",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "groups": {"x": {"ttft_s_sum": -0.5}}},
            "groups.x.ttft_s_sum: -0.5 is negative",
            id="a negative sum",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "number": -1},
            "number: -1 is negative",
            id="a negative number",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "models": {"m": {"output_tokens_total": -5}}},
            "models.m.output_tokens_total: -5 is negative",
            id="a negative total",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "models": {"m": {"output_tokens_total": 2**60}}},
            "models.m.output_tokens_total: 1152921504606846976 is above 2**53",
            id="a total beyond belief",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "groups": {"x": {"ttft_s_sum": 1e300}}},
            "groups.x.ttft_s_sum: 1e+300 is above 2**53",
            id="a sum beyond belief",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "models": {"m": {"arrivals_total": 1.5}}},
            "arrivals_total",
            id="half a request",
        ),
        pytest.param(
            {"gateway": "g", "sent_at_s": 1.0, "groups": {"x": {"in_flight": "2"}}},
            "in_flight",
            id="a count as text",
        ),
        pytest.param(b'{"gateway": "g", "sent_at_s": NaN}', "no JSON", id="not a number"),
    ],
)
async def test_a_malformed_report_is_refused_and_changes_nothing(
    system: RunningSystem, call: Call, body: Any, words: str
) -> None:
    status, answer = await call("POST", "/v1/exchange", body)
    assert status == 400
    assert words in answer["error"]["message"]
    await system.controller.turn()
    assert system.controller.summaries()["tiny"]["queued"] == 0
    assert (await call("POST", "/v1/exchange", REPORT))[0] == 200


async def test_a_report_over_the_limit_is_refused(call: Call) -> None:
    status, body = await call("POST", "/v1/exchange", io.BytesIO(b" " * ((1 << 20) + 1)))
    assert (status, body["error"]["code"]) == (413, "body_too_large")


async def test_a_report_of_a_thousand_groups_is_within_the_limit(call: Call) -> None:
    counts = GroupTraffic(99, 999_999, 99_999_999, 9_999, 99_999.123456, 99_999, 9_999.123456, 99)
    groups = {f"em-model-with-a-name-pool-with-a-name-{n}": counts for n in range(1000)}
    report = GatewayReport("g", 1.0, groups=groups)
    assert (await call("POST", "/v1/exchange", report))[0] == 200


async def test_before_the_first_decision_there_is_no_fleet() -> None:
    system = RunningSystem()
    async with (
        TestServer(build_api(system.controller, TOKEN)) as server,
        aiohttp.ClientSession(headers=AUTH) as http,
    ):
        url = server.make_url("/v1/exchange")
        async with http.post(url, data=msgspec.json.encode(REPORT)) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
        async with http.get(server.make_url("/v1/fleet")) as response:
            assert response.status == 503
        async with http.get(server.make_url("/readyz")) as response:
            body = await response.json()
            assert body["failing"] == {"start": "no decision has been made yet"}


async def test_the_fleet_shows_the_newest_decision_of_each_model(call: Call) -> None:
    status, body = await call("GET", "/v1/fleet")
    assert status == 200
    assert body["groups"][0]["name"] == "em-tiny-cheap-1"
    assert body["decisions"]["tiny"]["wanted"] == 1
    assert body["decisions"]["tiny"]["pending"] is None
    assert "1 wanted, 1 ready" in body["decisions"]["tiny"]["reason"]
    assert msgspec.convert(body, Fleet).groups
    assert body["loads"]["em-tiny-cheap-1"] == {
        "in_flight": 0,
        "running": 0,
        "waiting": 0,
        "kv_usage": 0.0,
        "kv_tokens": 2000,
        "max_running": 16,
    }


async def test_decisions_come_newest_first_and_can_be_filtered(call: Call) -> None:
    status, body = await call("GET", "/v1/decisions")
    assert status == 200
    numbers = [decision["seq"] for decision in body["decisions"]]
    assert numbers == sorted(numbers, reverse=True)
    first = body["decisions"][-1]
    assert first["actions"][0]["kind"] == "start"
    assert (first["model"], first["wanted"], first["need"]) == ("tiny", 1, 1)
    assert "min 1" in first["reason"]
    assert len((await call("GET", "/v1/decisions?limit=1"))[1]["decisions"]) == 1
    assert (await call("GET", "/v1/decisions?model=other"))[1] == {"decisions": []}


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "99999999999", "1.5", ""])
async def test_a_bad_limit_is_refused(call: Call, limit: str) -> None:
    status, body = await call("GET", f"/v1/decisions?limit={limit}")
    assert (status, body["error"]["code"]) == (400, "bad_limit")


async def test_a_store_out_of_reach_is_no_internal_error(system: RunningSystem, call: Call) -> None:
    system.journal.is_down = True
    status, body = await call("GET", "/v1/decisions")
    assert (status, body["error"]["code"]) == (503, "unavailable")


async def test_metrics_are_prometheus_text(call: Call) -> None:
    status, text = await call("GET", "/metrics")
    assert status == 200
    assert 'em_controller_desired_groups{model="tiny"} 1.0' in text


async def test_unknown_paths_and_methods_get_clear_errors(call: Call) -> None:
    status, body = await call("GET", "/v2/fleet")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = await call("GET", "/v1/exchange")
    assert status == 405
    assert "use POST" in body["error"]["message"]


async def test_one_decision_is_explained(call: Call) -> None:
    first = (await call("GET", "/v1/decisions"))[1]["decisions"][-1]
    status, told = await call("GET", f"/v1/decisions/{first['seq']}")
    assert status == 200
    assert (told["seq"], told["at_s"], told["model"]) == (first["seq"], first["at_s"], "tiny")
    assert told["sentence"] == first["reason"]
    assert told["candidates"][0]["is_chosen"]
    assert all(each["why"] for each in told["candidates"])
    assert told["counterfactuals"]
    assert told["replays"]


@pytest.mark.parametrize(
    ("seq", "status", "code"),
    [
        ("99999", 404, "no_such_decision"),
        ("0", 400, "bad_number"),
        ("-1", 400, "bad_number"),
        ("x", 400, "bad_number"),
        ("1.5", 400, "bad_number"),
        ("9" * 30, 400, "bad_number"),
        ("9" * 18, 400, "bad_number"),
        ("1/2", 404, "not_found"),
    ],
)
async def test_a_decision_that_is_none_is_refused(
    call: Call, seq: str, status: int, code: str
) -> None:
    answered, body = await call("GET", f"/v1/decisions/{seq}")
    assert (answered, body["error"]["code"]) == (status, code)
