"""What goes into the journal, how much of it, and how it comes back."""

import asyncio
import json
from dataclasses import replace

import msgspec
import pytest
from tests.controller.memory_store import MemoryJournal
from tests.core.scaling.market import record
from tests.core.scaling.world import World, config

from expertmesh.controller.journal import DecisionJournal
from expertmesh.controller.retention import keep_decisions
from expertmesh.core.scaling.contract import ModelState
from expertmesh.core.scaling.policy import decide
from expertmesh.core.scaling.replay import DecisionRecord, read_record, replay
from expertmesh.errors import UpstreamUnavailable


def size(of: DecisionRecord) -> int:
    return len(json.dumps(of.to_payload()))


def next_second(of: DecisionRecord) -> DecisionRecord:
    state = of.decision.state
    seen = replace(
        of.observation,
        gateways=tuple(
            replace(each, heard_at_s=each.heard_at_s + 1) for each in of.observation.gateways
        ),
        groups=tuple(
            replace(
                each, doing=replace(each.doing, at_s=each.doing.at_s + 1) if each.doing else None
            )
            for each in of.observation.groups
        ),
    )
    now_s = of.now_s + 1
    return DecisionRecord(now_s, of.config, state, seen, decide(of.config, state, seen, now_s))


def busy(groups: int, seconds: int) -> list[DecisionRecord]:
    """A model that has been followed for long: its forecaster and peak are full."""
    found = [
        record(
            groups={0: groups // 2, 2: groups - groups // 2},
            arrivals_per_s=8.0 * groups,
            max_groups=16,
        )
    ]
    for _ in range(seconds):
        found.append(next_second(found[-1]))
    return found


def test_an_entry_of_a_large_model_is_bounded() -> None:
    last = busy(groups=16, seconds=40)[-1]
    whole = len(json.dumps(msgspec.to_builtins(last)))
    assert size(last) < 60_000, "16 groups of 8 ranks"
    assert size(last) < 0.7 * whole
    assert read_record(json.loads(json.dumps(last.to_payload()))) == last


def test_what_a_state_gathers_with_time_does_not_make_entries_grow() -> None:
    records = busy(groups=2, seconds=3000)
    assert size(records[-1]) < 1.5 * size(records[1200])
    assert size(records[-1]) < 30_000


@pytest.mark.parametrize("at", [0, 1, 5, 35])
def test_only_what_changed_is_written_and_all_of_it_comes_back(at: int) -> None:
    of = busy(groups=4, seconds=40)[at]
    payload = of.to_payload()
    assert all(isinstance(group, str | dict) for group in payload["decision"]["state"]["groups"])
    again = read_record(json.loads(json.dumps(payload)))
    assert again == of
    assert replay(again).first_difference is None


def test_an_entry_that_was_written_in_full_is_still_read() -> None:
    for of in busy(groups=2, seconds=3):
        assert read_record(msgspec.to_builtins(of)) == of


def test_a_group_that_no_state_knows_is_refused() -> None:
    payload = busy(groups=2, seconds=1)[-1].to_payload()
    payload["decision"]["state"]["groups"][0] = "em-nobody-1"
    with pytest.raises(msgspec.ValidationError):
        read_record(payload)


def test_what_has_become_empty_comes_back_empty() -> None:
    world = World(config(up_delay_s=5.0), start_s=3)
    world.steps(10, queued=3)
    world.steps(2, queued=30)
    world.steps(2, queued=3)
    assert any(each.before.rise and not each.decision.state.rise for each in world.records)
    world.steps(200)
    for of in world.records:
        assert read_record(json.loads(json.dumps(of.to_payload()))) == of
    assert world.records[-1].decision.state.groups == ()


async def test_an_hour_without_change_is_an_entry_a_minute() -> None:
    store, state = MemoryJournal(), ModelState()
    journal = DecisionJournal(store)
    world = World(config())
    for _ in range(3600):
        world.step()
        if journal.is_due(world.records[-1]):
            await journal.write(world.records[-1])
    assert len(store.entries) == 60
    assert max(len(json.dumps(entry.payload)) for entry in store.entries) < 4_000
    assert state == ModelState()


async def test_a_decision_is_explained_from_the_journal_with_what_became_of_it() -> None:
    store = MemoryJournal()
    journal = DecisionJournal(store)
    world = World(config(min_groups=1), start_s=5)
    for _ in range(70):
        world.step()
        if journal.is_due(world.records[-1]):
            await journal.write(world.records[-1])
    told = await journal.explained(1)
    assert told is not None
    assert (told["seq"], told["model"], told["binding"]) == (1, "tiny", "min_groups")
    assert told["happened"]["starts"][0]["fate"] == "ready"
    assert await journal.explained(99) is None
    await store.append(1.0, "decision", "tiny", {"decision": {"reason": "old"}})
    assert await journal.explained(len(store.entries)) is None
    await journal.write_started(2.0, [])
    assert await journal.explained(len(store.entries)) is None
    newest, *_ = await journal.newest(5, None)
    assert newest["reason"] == "old"
    shown = (await journal.newest(5, "tiny"))[1]
    assert shown["demand"]["queued"] == 0, "whole, though zeros are not written"


# Forgetting


class Forgetful:
    def __init__(self, stop: asyncio.Event, *, is_away: bool = False) -> None:
        self.stop, self.is_away = stop, is_away
        self.asked: list[float] = []

    async def forget(self, before_s: float) -> int:
        self.asked.append(before_s)
        if len(self.asked) == 3 or self.is_away:
            self.stop.set()
        if self.is_away:
            raise UpstreamUnavailable("store: connection refused")
        return 2000 if len(self.asked) < 3 else 0


async def test_old_decisions_are_forgotten_in_batches_until_none_is_left() -> None:
    stop = asyncio.Event()
    store = Forgetful(stop)
    await asyncio.wait_for(keep_decisions(store, 3600.0, lambda: 10_000.0, stop), 5)
    assert store.asked == [6400.0, 6400.0, 6400.0]


async def test_a_store_that_is_away_does_not_end_it() -> None:
    stop = asyncio.Event()
    await asyncio.wait_for(keep_decisions(Forgetful(stop, is_away=True), 1.0, lambda: 9.0, stop), 5)
