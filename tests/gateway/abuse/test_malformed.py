"""Ten thousand wrong requests to the gateway as a process of its own."""

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from tests.gateway.abuse.fast_rank import fast_rank
from tests.gateway.abuse.gateway_process import GatewayProcess, gateway_process
from tests.gateway.abuse.malformed import Case, End, Maker
from tests.gateway.abuse.wire import Answer, BadAnswer, read_answers

from expertmesh.core.domain.tenant import Limits

REQUESTS = 10_000
WARM_UP = 1_000
AT_ONCE = 200
SECONDS_EACH = 2.0
"""Within that a connection is answered or closed."""
BOUNDS = {"head_timeout_s": 0.3, "body_timeout_s": 0.3, "keep_alive_s": 0.3}
GROWTH_BYTES = 20 * 2**20
RIGHT_5XX = (501, 503, 505)
ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass
class Tally:
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What went wrong, each with the first requests that it happened to."""
    statuses: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def fault(self, case: Case, what: str) -> None:
        examples = self.faults.setdefault(f"{case.name}: {what}"[:300], [])
        if len(examples) < 3:
            examples.append(f"{case.end} {b'|'.join(case.pieces)[:600]!r}")


@pytest.mark.integration
def test_ten_thousand_wrong_requests_do_no_harm(tmp_path: Path) -> None:
    uvloop.run(_attack(tmp_path))


async def _attack(folder: Path) -> None:
    async with (
        fast_rank() as rank,
        gateway_process(
            folder,
            [rank.url],
            bounds=BOUNDS,
            key_limits=Limits(concurrent_requests=AT_ONCE),
        ) as gateway,
    ):
        maker, tally = Maker(gateway.secret, seed=20), Tally()
        cases = list(maker.cases(REQUESTS))
        await _send_all(gateway, cases[:WARM_UP], tally)
        before = await gateway.at_rest()
        await _send_all(gateway, cases[WARM_UP:], tally)
        after = await gateway.at_rest()

        assert not tally.faults, json.dumps(tally.faults, indent=1)
        assert not rank.faults, rank.faults[:10]
        assert sum(tally.statuses.values()) > REQUESTS / 2
        assert {200, 400, 401, 404, 405, 408, 413, 415, 417, 431, 501} <= set(tally.statuses)
        assert after.rss_bytes - before.rss_bytes < GROWTH_BYTES
        await gateway.left(before)
        assert gateway.complaints() == []
        await _room_for_as_many_as_allowed(gateway)
        answers = await _answers(gateway, maker.good("/v1/chat/completions"))
        assert [answer.status for answer in answers] == [200]
        print(f"\n{dict(sorted(tally.statuses.items()))}; slowest {tally.slowest_s:.2f} s; {after}")


async def _send_all(gateway: GatewayProcess, cases: list[Case], tally: Tally) -> None:
    left = iter(cases)

    async def work() -> None:
        for case in left:
            await _send(gateway.port, case, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


async def _send(port: int, case: Case, tally: Tally) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.monotonic()
    data, ended = b"", False
    try:
        async with asyncio.timeout(SECONDS_EACH):
            try:
                for piece in case.pieces:
                    writer.write(piece)
                    await asyncio.sleep(0)
                if case.end is End.HALF_CLOSE:
                    writer.write_eof()
                elif case.end is End.RESET:
                    _reset(writer)
                    return
                while not _enough(case, data):
                    part = await reader.read(65_536)
                    if not part:
                        ended = True
                        break
                    data += part
            except (ConnectionError, OSError):
                ended = True
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - began_s)
        _judge(case, read_answers(data, ended), ended, tally)
    except TimeoutError:
        tally.fault(case, f"neither answered nor closed; got {data[:300]!r}")
    except BadAnswer as bad:
        tally.fault(case, f"an answer that is none: {bad}")
    finally:
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _enough(case: Case, data: bytes) -> bool:
    answers = read_answers(data)
    # Where the server closes, its end is waited for, so that no answer too many goes unseen.
    return bool(answers) and not answers[-1].closes and len(answers) >= len(case.expected or (0,))


def _judge(case: Case, answers: list[Answer], ended: bool, tally: Tally) -> None:
    statuses = tuple(answer.status for answer in answers)
    tally.statuses.update(statuses)
    # A connection that was reset may have lost the answer on its way.
    if case.expected is not None and case.end is End.WAIT and statuses != case.expected:
        tally.fault(case, f"answered with {statuses} instead of {case.expected}")
    if not answers and not ended:
        tally.fault(case, "no answer")
    for answer in answers:
        if answer.status >= 500 and answer.status not in RIGHT_5XX:
            tally.fault(case, f"answered with {answer.status}: {answer.body[:300]!r}")
        if answer.status >= 400 and not _is_error(answer):
            tally.fault(case, f"an error of another shape: {answer.body[:300]!r}")


def _is_error(answer: Answer) -> bool:
    if answer.headers.get("content-type") != "application/json":
        return False
    body = json.loads(answer.body)
    if body.get("type") == "error":
        return set(body) == {"type", "error", "request_id"} and set(body["error"]) == {
            "type",
            "message",
        }
    return set(body) == {"error"} and set(body["error"]) == ERROR_FIELDS


async def _answers(gateway: GatewayProcess, request: bytes) -> list[Answer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request)
    data = b""
    while not (answers := read_answers(data)):
        part = await asyncio.wait_for(reader.read(65_536), 10)
        assert part, data
        data += part
    writer.close()
    return answers


async def _room_for_as_many_as_allowed(gateway: GatewayProcess) -> None:
    """A reservation that was never given back would leave room for fewer."""
    requests = []
    for number in range(AT_ONCE + 1):
        body = json.dumps(
            {
                "model": "tiny-moe",
                "stream": True,
                "messages": [{"role": "user", "content": f"plan=room-{number}:2:1000:0"}],
            }
        ).encode()
        requests.append(gateway.head("/v1/chat/completions", len(body)) + body)
    results = await asyncio.gather(*(_answers(gateway, request) for request in requests))
    statuses = Counter(answers[0].status for answers in results)
    assert statuses == {200: AT_ONCE, 429: 1}
