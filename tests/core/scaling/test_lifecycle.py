from dataclasses import replace

import pytest
from tests.core.scaling.world import EP2, config

from expertmesh.core.domain.fleet import GroupSpec, GroupState, Rank
from expertmesh.core.scaling.contract import (
    ApplicationSeen,
    GroupRecord,
    GroupSeen,
    Observation,
    RankSeen,
    ReplicaSeen,
)
from expertmesh.core.scaling.lifecycle import LEGAL, Room, advance, enter, is_complete

STARTING, READY, DRAINING, LOST, GONE = GroupState
CONFIG = config()
SPEC = GroupSpec("em-tiny-cheap-1", "tiny", "/models/tiny", "cheap", EP2, 1024, 0.6)
URLS = ("http://a/1", "http://b/1")
MEMBERS = ("a/1", "b/2")
SERVING = GroupRecord(
    spec=SPEC,
    state=READY,
    since_s=50.0,
    requested_at_s=0.0,
    ranks=tuple(Rank(index, url) for index, url in enumerate(URLS)),
    members=MEMBERS,
    served=True,
)
ASKED = GroupRecord(spec=SPEC, state=STARTING, since_s=0.0, requested_at_s=0.0)
BACK = replace(SERVING, state=STARTING, ranks=())
LOST_NOW = replace(SERVING, state=LOST, since_s=95.0, message="rank 1 did not answer")


def replicas(*states: str, members: tuple[str | None, ...] = MEMBERS, alive: bool | None = True):
    return tuple(
        ReplicaSeen(state, member, alive) for state, member in zip(states, members, strict=False)
    )


RUNNING = replicas("RUNNING", "RUNNING")
RANKS = tuple(RankSeen(url, 0, index, 2) for index, url in enumerate(URLS))


def seen(
    status: str | None = "RUNNING",
    members: tuple[ReplicaSeen, ...] = RUNNING,
    ranks: tuple[RankSeen, ...] = RANKS,
    placement_group: bool | None = None,
) -> GroupSeen:
    application = None if status is None else ApplicationSeen(status, "its message", members)
    return GroupSeen(SPEC.name, application, ranks, placement_group)


def mute(failures: int) -> tuple[RankSeen, ...]:
    return (RANKS[0], RankSeen(URLS[1], failures))


FRESH = replicas("RUNNING", "RUNNING", members=("a/7", "b/8"))
UNKNOWN = Room(None, None)
REMOVED = {"removed_at_s": 90.0}


@pytest.mark.parametrize(
    ("record", "look", "room", "after", "words"),
    [
        pytest.param(ASKED, seen(), True, READY, "", id="all ranks answer"),
        pytest.param(
            ASKED, seen("DEPLOYING"), True, READY, "", id="Serve's own status may lag behind"
        ),
        pytest.param(
            ASKED,
            seen(members=replicas("RUNNING", "STARTING")),
            True,
            STARTING,
            "loading",
            id="one replica still starts",
        ),
        pytest.param(ASKED, seen(ranks=RANKS[:1]), True, STARTING, "loading", id="one rank only"),
        pytest.param(
            ASKED,
            seen(ranks=(RANKS[0], RankSeen(URLS[1], 0, 1, 4))),
            True,
            STARTING,
            "loading",
            id="a rank of another world size",
        ),
        pytest.param(
            ASKED,
            seen(ranks=(RANKS[0], RankSeen(URLS[1], 0, 0, 2))),
            True,
            STARTING,
            "loading",
            id="one rank twice",
        ),
        pytest.param(
            ASKED,
            seen("DEPLOYING", replicas("STARTING", "STARTING", members=(None, None)), ()),
            True,
            STARTING,
            "waiting for its processes",
            id="placed but not started",
        ),
        pytest.param(
            ASKED, seen("DEPLOYING", (), ()), True, STARTING, "Serve builds", id="not built yet"
        ),
        pytest.param(
            ASKED, seen("DEPLOY_FAILED", (), ()), True, LOST, "start failed", id="start failed"
        ),
        pytest.param(
            ASKED, seen("UNHEALTHY", (), ()), True, LOST, "start failed", id="unhealthy at once"
        ),
        pytest.param(
            BACK, seen("UNHEALTHY"), True, STARTING, "loading", id="a restart is unhealthy first"
        ),
        pytest.param(
            ASKED, seen("DEPLOYING", (), ()), False, LOST, "no room in pool", id="room has gone"
        ),
        pytest.param(SERVING, seen(), True, READY, "", id="all is well"),
        pytest.param(SERVING, seen(), False, READY, "", id="serving groups keep their room"),
        pytest.param(SERVING, seen(ranks=mute(2)), True, READY, "", id="two probes missed"),
        pytest.param(
            SERVING, seen(ranks=mute(3)), True, LOST, "rank 1 at http://b/1", id="three missed"
        ),
        pytest.param(
            SERVING,
            seen(members=replicas("RUNNING", "RUNNING", alive=False)),
            True,
            LOST,
            "2 of its 2 ranks is dead",
            id="its nodes are dead",
        ),
        pytest.param(
            SERVING,
            seen(members=replicas("RUNNING", "RUNNING", alive=None)),
            True,
            READY,
            "",
            id="nodes could not be listed",
        ),
        pytest.param(SERVING, seen("UNHEALTHY"), True, LOST, "UNHEALTHY: its m", id="unhealthy"),
        pytest.param(SERVING, seen("DELETING"), True, LOST, "DELETING", id="deleted by others"),
        pytest.param(
            SERVING,
            seen(members=replicas("STOPPING", "RUNNING")),
            True,
            LOST,
            "restarts its gang",
            id="a member is stopped",
        ),
        pytest.param(SERVING, seen(members=FRESH), True, LOST, "restarts", id="new processes"),
        pytest.param(
            SERVING,
            seen(members=replicas("RECOVERING", "RECOVERING")),
            True,
            READY,
            "",
            id="Serve itself was restarted",
        ),
        pytest.param(
            SERVING, seen(None), True, READY, "", id="Serve lists nothing but the ranks answer"
        ),
        pytest.param(LOST_NOW, seen(ranks=mute(9)), True, LOST, "rank 1", id="Serve may act yet"),
        pytest.param(
            LOST_NOW, seen(members=FRESH, ranks=()), True, STARTING, "restarts", id="restarted"
        ),
        pytest.param(
            LOST_NOW,
            seen("DEPLOYING", replicas("STARTING", members=(None,)), ()),
            True,
            STARTING,
            "restarts",
            id="restarted and waiting for a node",
        ),
        pytest.param(LOST_NOW, seen(), True, STARTING, "answer again", id="was only out of reach"),
        pytest.param(
            replace(SERVING, **REMOVED, state=DRAINING),
            seen(None, placement_group=True),
            True,
            DRAINING,
            "",
            id="its placement group is still there",
        ),
        pytest.param(
            replace(SERVING, **REMOVED, state=DRAINING),
            seen(None, placement_group=None),
            True,
            DRAINING,
            "",
            id="placement groups are not known",
        ),
        pytest.param(
            replace(SERVING, **REMOVED, state=DRAINING),
            seen("DELETING", placement_group=False),
            True,
            DRAINING,
            "",
            id="its application is still there",
        ),
        pytest.param(
            replace(SERVING, **REMOVED, state=DRAINING),
            seen(None, placement_group=False),
            True,
            GONE,
            "disappeared",
            id="drained and gone",
        ),
        pytest.param(
            replace(LOST_NOW, **REMOVED),
            seen(None, placement_group=False),
            False,
            GONE,
            "disappeared",
            id="lost and gone",
        ),
    ],
)
def test_what_follows_from_what_is_seen(
    record: GroupRecord, look: GroupSeen, room: bool, after: GroupState, words: str
) -> None:
    result, removal = advance(CONFIG, record, look, Observation(), Room(room, room), 100.0)
    assert result.state is after
    assert words in result.message
    assert removal is None
    assert result.since_s == (record.since_s if after is record.state else 100.0)


@pytest.mark.parametrize(
    ("record", "look", "room", "words"),
    [
        pytest.param(LOST_NOW, seen(), False, "no room in pool cheap", id="its host has died"),
        pytest.param(
            replace(LOST_NOW, since_s=40.0), seen(ranks=mute(9)), True, "within 60 s", id="too late"
        ),
        pytest.param(
            replace(ASKED, state=LOST, failed_start=True, message="start failed: x"),
            seen("DEPLOY_FAILED"),
            True,
            "start failed: x",
            id="a failed start is not waited for",
        ),
        pytest.param(LOST_NOW, seen(None), True, "disappeared", id="Serve does not know it"),
        pytest.param(LOST_NOW, seen("DEPLOY_FAILED"), True, "DEPLOY_FAILED", id="Serve gave up"),
    ],
)
def test_when_a_lost_group_is_given_up(
    record: GroupRecord, look: GroupSeen, room: bool, words: str
) -> None:
    after, removal = advance(CONFIG, record, look, Observation(), Room(room, room), 100.0)
    assert after == record
    assert removal is not None
    assert words in removal.why


@pytest.mark.parametrize("record", [SERVING, LOST_NOW, replace(LOST_NOW, **REMOVED), ASKED])
def test_nothing_is_concluded_from_serves_silence(record: GroupRecord) -> None:
    look = GroupSeen(SPEC.name, None, RANKS if record is SERVING else (), None)
    result = advance(CONFIG, record, look, Observation(serve_answers=False), UNKNOWN, 100.0)
    assert result == (record, None)


def test_a_group_that_waits_for_nodes_is_pending() -> None:
    look = seen("DEPLOYING", replicas("STARTING", "STARTING", members=(None, None)), ())
    after, _ = advance(CONFIG, ASKED, look, Observation(), Room(True, False), 100.0)
    assert (after.state, after.message) == (STARTING, "pending: no room in pool cheap")


@pytest.mark.parametrize("record", [ASKED, SERVING, LOST_NOW, replace(SERVING, state=DRAINING)])
def test_a_new_controller_forgets_groups_that_ended_before_it_started(record: GroupRecord) -> None:
    first = Observation(first_look=True)
    nothing = seen(None, ranks=(RankSeen(URLS[0], 1), RankSeen(URLS[1], 1)))
    assert advance(CONFIG, record, nothing, first, UNKNOWN, 100.0)[0].state is GONE
    kept = replace(first, serve_answers=False)
    assert advance(CONFIG, record, nothing, kept, UNKNOWN, 100.0)[0].state is record.state
    answering = seen(None, ranks=RANKS[:1])
    assert advance(CONFIG, SERVING, answering, first, UNKNOWN, 100.0)[0].state is READY


def test_a_start_has_a_deadline() -> None:
    late = CONFIG.timing.start_deadline_s
    after, _ = advance(CONFIG, ASKED, seen("DEPLOYING", (), ()), Observation(), UNKNOWN, late)
    assert (after.state, after.failed_start) == (LOST, True)


@pytest.mark.parametrize(
    ("start_s", "said_s", "deadline_s"),
    [(60.0, None, 900.0), (600.0, None, 2400.0), (60.0, 180.0, 180.0), (600.0, 180.0, 180.0)],
)
def test_the_deadline_is_the_manifests_or_fits_the_planned_start(
    start_s: float, said_s: float | None, deadline_s: float
) -> None:
    options = tuple(replace(option, start_s=start_s) for option in CONFIG.options)
    told = config(start_deadline_s=said_s)
    assert replace(told, options=options).start_deadline_s(SPEC) == deadline_s


def test_a_ready_group_has_the_addresses_of_its_ranks_in_order() -> None:
    look = seen(ranks=(RankSeen("http://z", 0, 0, 2), RankSeen("http://a", 0, 1, 2)))
    after, _ = advance(CONFIG, ASKED, look, Observation(), UNKNOWN, 100.0)
    assert after.ranks == (Rank(0, "http://z"), Rank(1, "http://a"))
    assert after.members == MEMBERS
    assert is_complete(after, look)


def test_the_table_allows_no_way_out_of_gone_and_no_other_state() -> None:
    assert set(LEGAL) == set(GroupState)
    assert not LEGAL[GONE]


@pytest.mark.parametrize(
    ("before", "after"), [(before, after) for before in GroupState for after in GroupState]
)
def test_only_legal_steps_are_taken(before: GroupState, after: GroupState) -> None:
    record = replace(SERVING, state=before)
    if after in LEGAL[before]:
        assert enter(record, after, 100.0, "why").state is after
    else:
        with pytest.raises(AssertionError, match=SPEC.name):
            enter(record, after, 100.0, "why")
