"""Calls from pages of other hosts, as a browser makes them."""

import io
from typing import Any

import aiohttp
import pytest
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, standing

PAGE = "https://chat.example"
CHAT_PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "one"}]}
PATHS = (CHAT_PATH, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/models", "/v1/none")
ASKED = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


def of_cors(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {k.lower(): v for k, v in response.headers.items() if k.lower().startswith("access-")}


async def preflight(stand: Stand, path: str, origin: str = PAGE) -> aiohttp.ClientResponse:
    response = await stand.http.options(stand.url + path, headers={**ASKED, "origin": origin})
    await response.read()
    return response


async def test_off_by_default(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    for path in PATHS:
        response = await preflight(stand, path)
        assert response.status in (404, 405)
        assert of_cors(response) == {}
    for secret in (SECRET, "wrong"):
        async with stand.post(CHAT_PATH, CHAT, secret=secret, headers={"origin": PAGE}) as answer:
            assert of_cors(answer) == {}
            assert "vary" not in answer.headers


async def test_preflight() -> None:
    async with standing(cors_origins=(PAGE,)) as stand:
        for path in PATHS:
            response = await preflight(stand, path)
            assert response.status == 204
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "origin" in response.headers["vary"].lower()
            methods = response.headers["access-control-allow-methods"].split(", ")
            assert {"GET", "POST"} <= set(methods)
            allowed = response.headers["access-control-allow-headers"].split(", ")
            assert {
                "authorization",
                "content-type",
                "x-api-key",
                "anthropic-version",
                "anthropic-dangerous-direct-browser-access",
                "x-stainless-lang",
                "x-stainless-timeout",
                "x-stainless-helper-method",
            } <= set(allowed)
            assert int(response.headers["access-control-max-age"]) > 0
            assert "access-control-allow-credentials" not in response.headers
        for other in ("https://evil.example", "http://chat.example", "null", f"{PAGE}.evil"):
            response = await preflight(stand, CHAT_PATH, other)
            assert response.status == 405
            assert of_cors(response) == {}


async def test_a_preflight_says_which_headers_may_be_sent_and_read() -> None:
    async with standing(cors_origins=(PAGE,)) as stand:
        response = await preflight(stand, CHAT_PATH)
        assert of_cors(response).keys() >= {
            "access-control-allow-origin",
            "access-control-allow-methods",
            "access-control-allow-headers",
        }


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_answers_and_errors_can_be_read(stream: bool) -> None:
    async with standing(cors_origins=(PAGE, "https://other.example")) as stand:
        rank = await stand.rank()
        await stand.show(group_of(rank))
        cases = [
            (CHAT_PATH, CHAT, SECRET, 200),
            (CHAT_PATH, CHAT, "wrong", 401),
            (CHAT_PATH, {**CHAT, "model": "none"}, SECRET, 404),
            ("/v1/messages", {"model": 5}, SECRET, 400),
            ("/v1/files", CHAT, SECRET, 404),
        ]
        for path, asked, secret, status in cases:
            body = {**asked, "stream": stream}
            headers = {"origin": PAGE}
            async with stand.post(path, body, secret=secret, headers=headers) as response:
                await response.read()
                assert response.status == status
                shown = of_cors(response)
                assert shown["access-control-allow-origin"] == PAGE
                exposed = shown["access-control-expose-headers"].split(", ")
                assert {"x-request-id", "retry-after", "x-em-cost-usd"} <= set(exposed)
                assert "access-control-allow-credentials" not in shown
            headers = {"origin": "https://evil.example"}
            async with stand.post(path, body, secret=secret, headers=headers) as response:
                await response.read()
                assert response.status == status
                assert of_cors(response) == {}


async def test_what_the_head_alone_decides_can_be_read_as_well() -> None:
    async with standing(cors_origins=(PAGE,)) as stand:
        big = b" " * (9 * 1024 * 1024)
        for headers, status in (
            ({"x-api-key": SECRET}, 413),
            ({"x-api-key": "wrong"}, 401),
            ({"x-api-key": SECRET, **{f"x-{n}": "v" for n in range(120)}}, 431),
        ):
            async with stand.http.post(
                stand.url + CHAT_PATH, data=io.BytesIO(big), headers={"origin": PAGE, **headers}
            ) as response:
                assert response.status == status
                assert of_cors(response)["access-control-allow-origin"] == PAGE


async def test_every_page_when_the_star_is_named() -> None:
    async with standing(cors_origins=("*",)) as stand:
        response = await preflight(stand, CHAT_PATH, "https://any.example")
        assert response.status == 204
        assert response.headers["access-control-allow-origin"] == "*"
        async with stand.http.get(
            f"{stand.url}/v1/models", headers={"origin": "null", "x-api-key": SECRET}
        ) as answer:
            assert of_cors(answer)["access-control-allow-origin"] == "*"


async def test_origins_can_change_while_it_runs() -> None:
    async with standing() as stand:
        assert (await preflight(stand, CHAT_PATH)).status == 405
        stand.service.use(QUICK, (PAGE,))
        assert (await preflight(stand, CHAT_PATH)).status == 204
        stand.service.use(QUICK, ())
        assert (await preflight(stand, CHAT_PATH)).status == 405


async def test_a_client_that_is_no_browser_gets_no_such_headers() -> None:
    async with standing(cors_origins=(PAGE,)) as stand:
        await stand.show()
        async with stand.http.get(
            f"{stand.url}/v1/models", headers={"x-api-key": SECRET}
        ) as response:
            assert response.status == 200
            assert of_cors(response) == {}
        # Without an origin it is no preflight.
        async with stand.http.options(stand.url + CHAT_PATH) as response:
            assert (response.status, response.headers["allow"]) == (405, "POST")
