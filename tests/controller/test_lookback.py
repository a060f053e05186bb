"""What decisions were worth: from a real ledger and journal to the metrics."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.controller.running_system import RunningSystem, deployment_of
from tests.core.scaling.world import World, config, pool
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.controller.configs import served_model
from expertmesh.controller.journal import DECISION
from expertmesh.controller.lookback import BIN_S, DAY_S, Lookback
from expertmesh.controller.loop import Controller, ControllerParts
from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.controller.money import LAG_S
from expertmesh.controller.picture import HindsightShown
from expertmesh.core.domain.fleet import ExternalRoute
from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.scaling.contract import ModelState, ScalingConfig, Timing
from expertmesh.core.scaling.hindsight import Served
from expertmesh.errors import UpstreamUnavailable
from expertmesh.store.database import Database, open_database
from expertmesh.store.journal import Journal
from expertmesh.store.ledger import Ledger
from expertmesh.store.served_work import served_work

CONFIG = config(pool("cheap", 0.3), pool("dear", 0.45))
"""8 requests at once for a group; a group is 0.60 or 0.90 $ an hour."""
HOUR_S = 3600.0
NOW_S = NOON_S + 2 * HOUR_S + LAG_S


class Stand:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.ledger = Ledger(database)
        self.journal = Journal(database)
        self.metrics = ControllerMetrics()
        self.lookback = Lookback(
            partial(served_work, database), self.ledger, self.journal, self.metrics
        )

    async def hold(self, name: str, start_s: float, end_s: float, usd: float) -> None:
        """From and to so many seconds after noon."""
        hold = CapacityHold(name, "tiny", "cheap", usd, NOON_S + start_s, NOON_S + end_s)
        await self.ledger.hold_capacity([replace(hold, ended_at_s=NOON_S + end_s)])

    async def serve(self, start_s: float, minutes: int, at_once: int, pool: str = "cheap") -> None:
        await self.ledger.add_usage(
            [
                usage_record(
                    f"{pool}-{start_s}-{minute}-{second}-{number}",
                    NOON_S + start_s + 60 * minute + second,
                    model="tiny",
                    pool=pool,
                    duration_s=1.0,
                )
                for minute in range(minutes)
                for second in range(60)
                for number in range(at_once)
            ]
        )

    async def look(self, now_s: float = NOW_S, of: ScalingConfig = CONFIG) -> dict[str, float]:
        await self.lookback.look({"tiny": (of, ModelState())}, now_s)
        return self.shown()

    def shown(self) -> dict[str, float]:
        lines = self.metrics.text().decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name.removeprefix("em_controller_"): float(value) for name, _, value in pairs}


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    yield Stand(database)
    await database.close()


SPENT = 'hindsight_usd{model="tiny",part="spent"}'
LEAST = 'hindsight_usd{model="tiny",part="least"}'
SPAN = 'hindsight_span_seconds{model="tiny"}'
ENDS = 'hindsight_timestamp_seconds{model="tiny"}'


async def test_what_stood_idle_is_what_could_have_been_saved(stand: Stand) -> None:
    await stand.hold("em-tiny-cheap-1", 0, 2 * HOUR_S, usd=0.6)
    await stand.serve(1800, minutes=30, at_once=4)
    found = await stand.look()
    assert found[SPENT] == pytest.approx(1.2)
    # A group for half an hour and the minute in which the last requests end, started once.
    assert found[LEAST] == pytest.approx(0.6 * (31 * 60 + 60) / HOUR_S)
    assert found[SPAN] == 2 * HOUR_S
    assert found[ENDS] == NOON_S + 2 * HOUR_S


async def test_two_groups_that_were_needed_leave_nothing_to_regret(stand: Stand) -> None:
    await stand.hold("em-tiny-cheap-1", 0, HOUR_S, usd=0.6)
    await stand.hold("em-tiny-dear-2", 0, HOUR_S, usd=0.9)
    await stand.serve(0, minutes=60, at_once=12)
    found = await stand.look(NOON_S + HOUR_S + LAG_S)
    assert found[SPENT] == pytest.approx(1.5)
    assert found[LEAST] == pytest.approx(1.5, rel=0.02)


async def test_a_minute_of_which_a_group_was_held_for_a_part_does_not_count(stand: Stand) -> None:
    of = replace(CONFIG, rules=replace(CONFIG.rules, min_groups=1))
    await stand.hold("em-tiny-cheap-1", 59, HOUR_S, usd=0.6)
    found = await stand.look(NOON_S + 180 + LAG_S, of)
    assert found[SPAN] == 120
    assert found[SPENT] == found[LEAST] == pytest.approx(0.02)
    young = await stand.look(NOON_S + 60 + LAG_S, of)
    assert SPENT not in young


async def test_what_providers_served_is_no_work_of_groups(stand: Stand) -> None:
    await stand.hold("em-tiny-cheap-1", 0, HOUR_S, usd=0.6)
    await stand.serve(0, minutes=60, at_once=4, pool="provider")
    route = ExternalRoute("provider", "https://example.com", "m", "KEY", 1.0, 1.0, 1.0)
    found = await stand.look(of=replace(CONFIG, external=(route,)))
    assert found[SPENT] == pytest.approx(0.6)
    assert found[LEAST] == 0.0


async def test_it_looks_at_a_day_at_most_and_only_at_what_the_ledger_has(stand: Stand) -> None:
    await stand.hold("em-tiny-cheap-1", 0, 3 * DAY_S, usd=0.6)
    found = await stand.look(NOON_S + 2 * DAY_S + LAG_S)
    assert found[SPAN] == DAY_S
    assert found[SPENT] == pytest.approx(0.6 * 24)
    assert found[LEAST] == 0.0


async def test_a_model_without_a_group_shows_nothing(stand: Stand) -> None:
    await stand.ledger.hold_capacity([capacity_hold("em-other-1", model="other")])
    assert not [name for name in await stand.look() if name.startswith("hindsight")]
    assert stand.lookback.regrets == {}


async def test_what_is_gone_is_shown_no_longer(stand: Stand) -> None:
    await stand.hold("em-tiny-cheap-1", 0, HOUR_S, usd=0.6)
    assert SPENT in await stand.look()
    assert set(stand.lookback.regrets) == {"tiny"}
    assert SPENT not in await stand.look(NOON_S + 2 * DAY_S)
    assert SPENT in await stand.look()
    stand.metrics.forget("tiny")
    assert SPENT not in stand.shown()


async def test_a_store_that_does_not_answer_leaves_what_was_known(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    await stand.hold("em-tiny-cheap-1", 0, HOUR_S, usd=0.6)
    before = await stand.look()

    async def gone(*_: float) -> object:
        raise UpstreamUnavailable("store: away")

    lookback = Lookback(gone, stand.ledger, stand.journal, stand.metrics)  # type: ignore[arg-type]
    for _ in range(2):
        await lookback.look({"tiny": (CONFIG, ModelState())}, NOW_S)
    assert stand.shown() == before
    assert caplog.text.count("store: away") == 1


async def test_what_decisions_expected_is_compared_with_what_came(stand: Stand) -> None:
    world = World(config(pool("cheap", 0.3), up_delay_s=0.0, down_delay_s=5.0), start_s=20)
    for _ in range(2):
        world.steps(40, queued=3)
        world.steps(120)
    last_s = world.records[-1].now_s
    for record in [each for each in world.records if each.decision.actions or each.now_s % 5 == 0]:
        await stand.journal.append(record.now_s, DECISION, "tiny", record.to_payload())
    found = await stand.look(last_s)
    ratio = found['start_over_expected_ratio{model="tiny",option="cheap/t1d2e2"}']
    assert 0.3 < ratio < 0.6, "20 s, where 60 s and then fewer were expected"
    assert not [name for name in found if name.startswith("load_error")], "nothing was forecast"
    later = await stand.look(last_s + 2 * HOUR_S)
    assert not [name for name in later if "start_over_expected" in name], "it is too old"


async def test_entries_of_another_version_are_passed_over(stand: Stand) -> None:
    await stand.journal.append(NOW_S - 5, DECISION, "tiny", {"decision": {"of": "old"}})
    assert not [name for name in await stand.look() if "error" in name and "tiny" in name]


class Watched(RunningSystem):
    """Its groups were given nothing to do."""

    def _controller(self) -> Controller:
        async def nothing(*_: float) -> dict[tuple[str, str, int], Served]:
            return {}

        parts = ControllerParts(
            self.serve, self.serve, self.journal, self.ledger, self.clock, served=nothing
        )
        models = [served_model(deployment_of(each)) for each in self.configs]
        return Controller(parts, self.configs, models, Timing())


async def test_a_running_controller_looks_back_and_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expertmesh.controller.lookback._FIRST_S", 0.01)
    system = Watched()
    await system.pass_s(400)
    stop = asyncio.Event()
    running = asyncio.create_task(system.controller.run(stop))

    async def shown() -> HindsightShown:
        while True:
            picture = system.controller.picture()
            assert picture is not None
            if picture.models[0].hindsight is not None:
                return picture.models[0].hindsight
            await asyncio.sleep(0.02)

    found = await asyncio.wait_for(shown(), 10)
    stop.set()
    await running
    # One group at 0.60 $ an hour, as the manifest wants at least.
    assert found.span_s == pytest.approx(240, abs=60)
    assert found.spent_usd == found.least_usd == pytest.approx(0.6 * found.span_s / HOUR_S)
    assert b"em_controller_hindsight_usd{" in system.controller.metrics.text()


async def test_it_looks_again_and_again_whatever_fails(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await stand.hold("em-tiny-cheap-1", 0, 3 * DAY_S, usd=0.6)
    waits: list[float] = []
    times = iter([NOON_S, NOON_S + HOUR_S + LAG_S, NOON_S + DAY_S + LAG_S])

    async def passed(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) > 4:
            raise asyncio.CancelledError

    monkeypatch.setattr("expertmesh.controller.lookback.asyncio.sleep", passed)
    models = {"tiny": (CONFIG, ModelState())}
    with pytest.raises(asyncio.CancelledError):
        await stand.lookback.run(lambda: models, lambda: next(times))
    # Each minute at first, then when there is an eighth more to look at, and hourly in the end.
    assert waits == [60.0, 60.0, HOUR_S / 8, HOUR_S, HOUR_S]
    assert "cannot be looked back on" in caplog.text, "the clock has failed"
    assert BIN_S == 60.0
