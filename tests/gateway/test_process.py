"""The command as a process of its own: start, reload and stop of a single worker."""

import asyncio
import json
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.gateway.gateway_process import (
    CHAT,
    GatewayProcess,
    Site,
    ask,
    free_port,
    launch,
    site,
    until,
    until_above,
    write_platform,
)
from tests.gateway.stand import MESH_TOKEN, group_of
from tests.mock_rank import MockRank

from expertmesh.core.metering.usage import Outcome

PAGE = "https://chat.example"


def slow_rank(tokens: int) -> MockRank:
    return MockRank(tokens=tokens, token_interval_s=0.05, mesh_token=MESH_TOKEN)


async def until_asked(place: Site, requests: int = 1) -> None:
    await until(lambda: len(place.rank.seen) >= requests)
    await asyncio.sleep(0.1)  # a few events of a stream


@pytest.mark.integration
async def test_a_stop_finishes_streams_and_writes_the_ledger(tmp_path: Path) -> None:
    async with site(tmp_path, slow_rank(30)) as place:
        key = await place.key()
        gateway = await place.start()
        stream = asyncio.create_task(ask(place.http, gateway.url, key, 29, True))
        await until_asked(place)
        gateway.signal(signal.SIGTERM)
        await until_refused(gateway)
        assert not stream.done()
        assert (await stream).counted == (4, 30)
        assert await asyncio.wait_for(gateway.process.wait(), 10) == 0
        assert "Traceback" not in gateway.errors
        (row,) = await place.ledger.usage()
        assert (row.completion_tokens, row.outcome, row.tenant) == (30, Outcome.OK, "team-a")
        assert [line["usage_id"] for line in gateway.lines()] == [row.request_id]
        assert names_in(place.state / "usage") == {"lock"}


async def until_refused(gateway: GatewayProcess) -> None:
    def is_refused() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), 1):
                return False
        except ConnectionRefusedError:
            return True

    await until(is_refused, 5)


@pytest.mark.integration
@pytest.mark.parametrize("again", [True, False], ids=["second signal", "time-out"])
async def test_a_stop_that_does_not_wait_tells_the_client(tmp_path: Path, again: bool) -> None:
    async with site(tmp_path, slow_rank(500)) as place:
        key = await place.key()
        timeout_s = 60.0 if again else 0.5
        gateway = await place.start("--drain-timeout-s", str(timeout_s))
        body = {
            "model": "tiny-moe",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
        }
        async with place.http.post(
            gateway.url + CHAT, json=body, headers={"Authorization": f"Bearer {key.secret}"}
        ) as response:
            await response.content.readuntil(b"w1 ")
            gateway.signal(signal.SIGINT)
            if again:
                await until_refused(gateway)
                gateway.signal(signal.SIGTERM)
            rest = await response.text()
        error = json.loads(rest.rstrip().rsplit("data: ", 1)[1])["error"]
        assert error["message"] == "The gateway shuts down."
        assert await asyncio.wait_for(gateway.process.wait(), 10) == 0
        assert "Traceback" not in gateway.errors
        (row,) = await place.ledger.usage()
        assert row.outcome is Outcome.ERROR and row.completion_tokens > 0


@pytest.mark.integration
async def test_a_second_signal_ends_the_wait_before_connections_are_refused(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as place:
        gateway = await place.start("--drain-delay-s", "60")
        gateway.signal(signal.SIGTERM)

        async def is_unready() -> bool:
            async with place.spread.get(f"{gateway.url}/readyz") as response:
                return response.status == 503

        await until(is_unready)
        assert await gateway.stop(10) == 0


@pytest.mark.integration
async def test_a_new_configuration_is_taken_without_dropping_a_request(tmp_path: Path) -> None:
    file = write_platform(tmp_path / "platform.yaml")
    async with site(tmp_path, slow_rank(40)) as place:
        key = await place.key()
        gateway = await place.start("--config", str(file))
        stream = asyncio.create_task(ask(place.http, gateway.url, key, 29, True, Origin=PAGE))
        await until_asked(place)
        ended = False

        async def client() -> list[int]:
            statuses = []
            while not ended:
                statuses.append((await ask(place.http, gateway.url, key)).status)
            return statuses

        async def is_allowed() -> bool:
            got = await ask(place.http, gateway.url, key, Origin=PAGE)
            assert got.status == 200
            return got.headers.get("access-control-allow-origin") == PAGE

        clients = [asyncio.create_task(client()) for _ in range(8)]
        assert not await is_allowed()
        write_platform(file, cors_origins=[PAGE], admission={"queued_requests": 1})
        gateway.signal(signal.SIGHUP)
        await until(is_allowed, 10)
        for number in range(5):
            write_platform(file, cors_origins=[PAGE, f"https://{number}.example"])
            gateway.signal(signal.SIGHUP)
            await until_above(lambda: gateway.errors.count("configuration again"), number + 1)
        file.write_text("kind: Platform\nname: [")
        gateway.signal(signal.SIGHUP)
        await until(lambda: "keeps its configuration" in gateway.errors, 10)
        assert f"keeps its configuration: {file}: is no YAML" in gateway.errors
        assert await is_allowed()
        write_platform(file, cors_origins=[PAGE], workers=5)
        gateway.signal(signal.SIGHUP)
        await until(lambda: "counts from the next start only" in gateway.errors, 10)
        ended = True
        statuses = [status for one in await asyncio.gather(*clients) for status in one]
        assert set(statuses) == {200} and len(statuses) > 8
        got = await stream
        assert got.whole and got.counted == (4, 30)
        assert await gateway.stop() == 0


@pytest.mark.integration
async def test_a_new_bound_of_the_queue_counts_for_requests_that_come_later(
    tmp_path: Path,
) -> None:
    file = write_platform(tmp_path / "platform.yaml", admission={"queued_requests": 2})
    async with site(tmp_path) as place:
        key = await place.key()
        gateway = await place.start("--config", str(file))
        await place.show(max_wait_s=60.0)
        waiting = [asyncio.create_task(ask(place.http, gateway.url, key, n)) for n in range(2)]

        async def are_queued() -> bool:
            return await place.metric(gateway, "em_gateway_queued_requests") == len(waiting)

        await until(are_queued)
        assert (await ask(place.http, gateway.url, key, 2)).status == 429
        write_platform(file, admission={"queued_requests": 4})
        gateway.signal(signal.SIGHUP)
        await until(lambda: "configuration again" in gateway.errors)
        waiting += [asyncio.create_task(ask(place.http, gateway.url, key, n)) for n in (3, 4)]
        await until(are_queued)
        assert (await ask(place.http, gateway.url, key, 5)).status == 429
        await place.show(group_of(place.rank))
        assert [(await one).status for one in waiting] == [200] * 4


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_key_works_from_the_moment_it_is_made(tmp_path: Path, workers: int) -> None:
    async with site(tmp_path) as place:
        gateway = await place.start("--workers", str(workers))
        for number in range(8):
            key = await place.key()
            assert (await ask(place.spread, gateway.url, key, number)).status == 200


@pytest.mark.integration
async def test_a_revoked_key_of_the_real_store(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        key = await place.key()
        gateway = await place.start()
        assert (await ask(place.http, gateway.url, key)).status == 200
        assert await place.keys.revoke(key.id, time.time())

        async def is_refused() -> bool:
            return (await ask(place.http, gateway.url, key)).status == 401

        await until(is_refused, 2.0)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "error: EXPERTMESH_MESH_TOKEN: is not set; set it to the mesh token"),
        (("--mesh-token-file", "/nowhere"), {}, "error: --mesh-token-file: /nowhere: cannot"),
        (
            ("--controller-url", "localhost:1"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: --controller-url: 'localhost:1': write it as http://host:port",
        ),
        (
            ("--host", "192.0.2.1"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: --host 192.0.2.1 --port",
        ),
        (
            ("--config", "{folder}/wrong.yaml"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: {folder}/wrong.yaml: gateway.workers: 0: ",
        ),
        (
            ("--config", "{folder}/redis.yaml"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: SOME_REDIS_URL: is not set, and limits.store is redis",
        ),
        (
            ("--config", "{folder}/redis.yaml"),
            {"EXPERTMESH_MESH_TOKEN": "x", "SOME_REDIS_URL": "db:secret@host"},
            "error: SOME_REDIS_URL: holds no URL of a Redis; write it as redis://",
        ),
        (
            ("--config", "{folder}/redis.yaml", "--workers", "2"),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: SOME_REDIS_URL: is not set, and limits.store is redis",
        ),
        (
            ("--workers", "2", "--state-dir", "{folder}/" + "x" * 100),
            {"EXPERTMESH_MESH_TOKEN": "x"},
            "error: limits: {folder}/" + "x" * 100 + "/limits/server.sock: too long",
        ),
    ],
    ids=[
        "no mesh token",
        "no token file",
        "no URL",
        "foreign address",
        "bad configuration",
        "no Redis URL",
        "bad Redis URL",
        "no Redis URL for workers",
        "no room for the name of a socket",
    ],
)
async def test_a_start_that_cannot_work_says_why(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    write_platform(tmp_path / "wrong.yaml", workers=0)
    limits = {"store": "redis", "redis_url_variable": "SOME_REDIS_URL"}
    write_platform(tmp_path / "redis.yaml", limits=limits)
    before = names_in(tmp_path)
    store = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    base = ("--controller-url", "http://127.0.0.1:1", "--store", store)
    state = ("--port", str(free_port()), "--state-dir", str(tmp_path / "state"))
    given = (argument.replace("{folder}", str(tmp_path)) for argument in arguments)
    process = await launch(*base, *state, *given, **environment)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert err.decode().startswith(message.replace("{folder}", str(tmp_path)))
    assert err.count(b"\n") == 1 and b"secret" not in err
    left = names_in(tmp_path) - before
    assert not [name for name in left if not name.startswith(("store.db", "state", "xxx"))]
    assert names_in(tmp_path / "state" / "usage") <= {"lock"}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_port_in_use_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as listener:
        port = str(listener.getsockname()[1])
        process = await launch(
            *("--controller-url", "http://127.0.0.1:1", "--port", port),
            *("--store", f"sqlite+aiosqlite:///{tmp_path}/store.db", "--workers", str(workers)),
            *("--state-dir", str(tmp_path / "state")),
            EXPERTMESH_MESH_TOKEN="x",
        )
        _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert err.decode() == (
        f"error: --port {port}: is in use on 127.0.0.1; "
        "stop what listens there or take another port\n"
    )
