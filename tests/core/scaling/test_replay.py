from dataclasses import replace

import msgspec
import pytest
from tests.core.scaling.world import World, config

from expertmesh.core.scaling.replay import DecisionRecord, read_record, replay


def recorded() -> list[DecisionRecord]:
    world = World(config())
    engine = {"max_num_seqs": 8, "nested": {"a": [1, 2.5]}}
    options = tuple(replace(option, engine=engine) for option in world.config.options)
    world.config = replace(world.config, options=options)
    world.steps(30, queued=9)
    world.running[world.serving[0]].mute = True
    world.steps(70)
    return world.records


def test_a_recorded_run_replays_to_equal_decisions_from_text() -> None:
    for record in recorded():
        text = msgspec.json.encode(record.to_payload())
        assert replay(read_record(msgspec.json.decode(text))).equal


def test_one_entry_replays_without_the_entries_before_it() -> None:
    last = recorded()[-1]
    assert replay(read_record(last.to_payload())).again == last.decision


def test_a_changed_entry_is_found_out() -> None:
    record = recorded()[0]
    rules = replace(record.config.rules, min_groups=2)
    changed = replace(record, config=replace(record.config, rules=rules))
    assert not replay(changed).equal


def test_an_entry_of_another_form_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        read_record({"now_s": 1.0, "decision": {}})
