from typing import Any

import pytest

from expertmesh.controller.newest_decisions import NewestDecisions
from expertmesh.errors import UpstreamUnavailable


class Journal:
    def __init__(self) -> None:
        self.count = 0
        self.asked: list[int] = []
        self.is_down = False

    async def read(self, limit: int, model: str | None) -> list[dict[str, Any]]:
        self.asked.append(limit)
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")
        return [{"seq": n} for n in range(self.count, max(0, self.count - limit), -1)]


def _seqs(decisions: list[dict[str, Any]]) -> list[int]:
    return [one["seq"] for one in decisions]


async def test_only_what_is_new_is_read_and_no_gap_is_left() -> None:
    journal, clock = Journal(), [0.0]
    newest = NewestDecisions(journal.read, lambda: clock[0])
    assert await newest.read() == []
    journal.count = 80
    assert await newest.read() == [], "asked a moment ago"
    clock[0] += 2
    assert _seqs(await newest.read()) == list(range(80, 30, -1))
    journal.asked.clear()
    journal.count = 83
    clock[0] += 2
    assert _seqs(await newest.read()) == list(range(83, 33, -1))
    assert journal.asked == [5]
    journal.count = 100
    clock[0] += 2
    assert _seqs(await newest.read()) == list(range(100, 50, -1))


async def test_a_journal_out_of_reach_is_told_and_asked_again() -> None:
    journal, clock = Journal(), [0.0]
    newest = NewestDecisions(journal.read, lambda: clock[0])
    journal.count, journal.is_down = 3, True
    with pytest.raises(UpstreamUnavailable):
        await newest.read()
    journal.is_down = False
    assert _seqs(await newest.read()) == [3, 2, 1]
