"""Requests made from OpenAPI documents, to the gateway as a process of its own."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.gateway.abuse.fast_rank import fast_rank
from tests.gateway.abuse.gateway_process import ALIAS, GatewayProcess, gateway_process
from tests.gateway.abuse.openapi import document
from tests.gateway.stand import MODEL

from expertmesh.store.keys import KeyBook

TOOL = "from schemathesis.cli import schemathesis; schemathesis()"
USAGE = "/admin/v1/usage"
DISABLE = "/admin/v1/tenants/{name}/disable"
FORTY = ("--max-examples", "40")
# Names of what there is come out of answers: those of the key in use and of its tenant as well. So
# what would lock the tool out runs apart, where it gets no such answers.
ADMIN_RUNS = (
    (*FORTY, "--exclude-path", DISABLE, "--exclude-path", USAGE, "--exclude-method", "DELETE"),
    (*FORTY, "--include-path", DISABLE),
    (*FORTY, "--include-method", "DELETE"),
    # Each report is a process of its own.
    ("--max-examples", "4", "--include-path", USAGE),
)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


async def fuzz(
    gateway: GatewayProcess, folder: Path, schema: Path, secret: str, *options: str
) -> None:
    """Fails with the tool's report, which holds a command for each request gone wrong."""
    # In a process of its own: this one stands in for ranks and controller meanwhile.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TOOL, "run", str(schema)),
        *("--url", f"http://127.0.0.1:{gateway.port}"),
        *("--header", f"Authorization:Bearer {secret}", "--generation-deterministic"),
        *("--no-shrink", "--continue-on-failure", "--checks", ",".join(CHECKS)),
        *("--request-timeout", "5", "--warnings", "off", "--no-color", *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-6000:]


@pytest.mark.integration
def test_requests_made_from_the_gateways_own_document(tmp_path: Path) -> None:
    uvloop.run(_own_api(tmp_path))


async def _own_api(folder: Path) -> None:
    async with fast_rank() as rank, gateway_process(folder, [rank.url]) as gateway:
        before = await gateway.at_rest()
        schema = folder / "gateway.json"
        schema.write_text(json.dumps(document([MODEL, ALIAS])))
        await fuzz(gateway, folder, schema, gateway.secret, "--max-examples", "60")
        assert rank.faults == []
        assert rank.requests > 200
        await gateway.at_rest()
        await gateway.left(before)
        assert gateway.complaints() == []


@pytest.mark.integration
def test_requests_made_from_the_document_of_the_admin_api(tmp_path: Path) -> None:
    uvloop.run(_admin_api(tmp_path))


async def _admin_api(folder: Path) -> None:
    async with fast_rank() as rank, gateway_process(folder, [rank.url]) as gateway:
        keys = KeyBook(gateway.database)
        secret = (await keys.create("ops", "fuzz", time.time(), admin=True)).secret
        schema = folder / "admin.json"
        schema.write_bytes(await _admin_document(gateway, secret))
        before = await gateway.at_rest()
        for options in ADMIN_RUNS:
            await fuzz(gateway, folder, schema, secret, *options)
            assert (await gateway.get("/admin/v1/keys", secret))[0] == 200
        assert len(await keys.list(None, None, 1000)) > 20
        await gateway.left(before)
        assert gateway.complaints() == []
        assert (await gateway.get("/v1/models", gateway.secret))[0] == 200


async def _admin_document(gateway: GatewayProcess, secret: str) -> bytes:
    deadline_s = time.monotonic() + 5
    while True:
        status, text = await gateway.get("/admin/v1/openapi.json", secret)
        if status == 200:
            return json.dumps(_with_good_names(json.loads(text))).encode()
        # The key is new.
        assert time.monotonic() < deadline_s, text
        await asyncio.sleep(0.1)


def _with_good_names(schema: dict[str, Any]) -> dict[str, Any]:
    """Names that the store takes, so that not all requests end at them."""
    good = {"type": "string", "pattern": "^t[a-z0-9]{1,8}$"}
    schema["components"]["schemas"]["KeyIn"]["properties"]["tenant"] = good
    for methods in schema["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "name":
                    parameter["schema"] = good
    return schema
