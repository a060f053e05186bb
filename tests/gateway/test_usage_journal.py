import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.gateway.metered import closed, opened

from expertmesh.core.metering.usage import Outcome
from expertmesh.errors import SetupError
from expertmesh.gateway.usage_journal import (
    Closed,
    LeftJournal,
    UsageJournal,
    left_journals,
)

ROOT = Path(__file__).parents[2]
SMALL = 4096
"""Bytes of a segment that holds some thirty records."""


def drain(journal: UsageJournal, most: int = 10) -> list[Closed]:
    taken: list[Closed] = []
    while batch := journal.unwritten(most):
        assert len(batch.records) <= most
        taken += batch.records
        journal.written(batch)
    return taken


def recovered(left: LeftJournal, most: int = 10) -> list[Closed]:
    return [usage for batch in left.batches(most) for usage in batch]


def killed(journal: UsageJournal, to: Path) -> LeftJournal:
    """What a kill at this moment would leave: the files as they are."""
    assert journal.folder is not None
    shutil.copytree(journal.folder, to / journal.folder.name)
    (left,) = left_journals(to)
    return left


def files(folder: Path | None) -> list[Path]:
    assert folder is not None
    return sorted(folder.glob("*.usage1"))


@pytest.fixture(params=["in files", "in memory"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UsageJournal]:
    root = tmp_path / "usage" if request.param == "in files" else None
    made = UsageJournal(root, segment_bytes=SMALL)
    yield made
    made.close()


def test_records_come_back_as_they_were_and_once(journal: UsageJournal) -> None:
    for number in range(100):
        assert journal.close_call(closed(number))
    assert journal.pending == 100
    assert drain(journal) == [closed(number) for number in range(100)]
    assert journal.pending == 0
    assert drain(journal) == []


def test_a_batch_stays_until_it_is_written(journal: UsageJournal) -> None:
    for number in range(50):
        journal.close_call(closed(number))
    first = journal.unwritten(40)
    journal.close_call(closed(50))
    assert journal.unwritten(40).records == first.records
    journal.written(first)
    assert drain(journal) == [closed(number) for number in range(40, 51)]


def test_segments_are_freed_when_the_ledger_has_them(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path, segment_bytes=SMALL)
    for number in range(100):
        journal.close_call(closed(number))
    assert len(files(journal.folder)) > 3
    drain(journal)
    journal.maintain()
    assert len(files(journal.folder)) == 2  # the one in use and the next
    journal.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "lock"]


def test_a_long_stream_does_not_keep_old_segments(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path / "usage", segment_bytes=SMALL)
    call = journal.open_call(opened(1000))
    call.progress(3)
    for number in range(200):
        journal.close_call(closed(number))
        if number % 40 == 0:
            drain(journal)
            journal.maintain()
            call.progress(number)
            assert len(files(journal.folder)) <= 4
    drain(journal)
    journal.maintain()
    call.progress(777)
    usage = recovered(killed(journal, tmp_path))[-1]
    assert (usage.request_id, usage.completion_tokens) == ("req_1000", 777)
    journal.close_call(closed(1000), call)
    assert drain(journal) == [closed(1000)]
    journal.close()


def test_what_was_open_is_billed_as_far_as_it_was_seen(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path / "usage", segment_bytes=SMALL)
    calls = [journal.open_call(opened(number)) for number in range(3)]
    calls[0].progress(5)
    calls[1].progress(6)
    journal.close_call(closed(1, completion_tokens=9), calls[1])
    journal.alive(1042.0)
    usages = {usage.request_id: usage for usage in recovered(killed(journal, tmp_path))}
    assert usages["req_1"] == closed(1, completion_tokens=9)
    broken_off = usages["req_0"]
    assert broken_off.outcome is Outcome.ERROR
    assert (broken_off.prompt_tokens, broken_off.cached_tokens) == (7, 0)
    assert (broken_off.completion_tokens, broken_off.duration_s) == (5, 42.0)
    assert broken_off.usd_per_mtok_out == 0.6
    assert usages["req_2"].completion_tokens == 0
    assert len(usages) == 3
    journal.close()


def test_without_a_sign_of_life_a_call_lasted_until_its_first_byte(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path / "usage", segment_bytes=SMALL)
    journal.open_call(opened(1))
    (usage,) = recovered(killed(journal, tmp_path))
    assert usage.duration_s == 0.5
    journal.close()


def test_progress_after_the_end_changes_nothing(journal: UsageJournal) -> None:
    call = journal.open_call(opened(1))
    journal.close_call(closed(1), call)
    for number in range(100, 200):
        journal.close_call(closed(number))
        call.progress(number)
    assert drain(journal) == [closed(1), *(closed(number) for number in range(100, 200))]
    journal.maintain()
    call.progress(1)


def test_a_living_worker_keeps_its_journal(tmp_path: Path) -> None:
    mine, other = (
        UsageJournal(tmp_path, segment_bytes=SMALL),
        UsageJournal(tmp_path, segment_bytes=SMALL),
    )
    mine.close_call(closed(1))
    assert mine.folder != other.folder
    assert left_journals(tmp_path) == []
    mine.close()
    (left,) = left_journals(tmp_path)
    assert left_journals(tmp_path) == []  # held already
    assert recovered(left) == [closed(1)]
    left.release()
    (left,) = left_journals(tmp_path)
    left.delete()
    assert left_journals(tmp_path) == []
    other.close()


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SetupError, match=r"file/usage: .* cannot be kept there: .*; make"):
        UsageJournal(blocked / "usage")


def test_a_full_disk_at_the_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(SetupError, match=f"{tmp_path}: .*No space left on device; make 4194304"):
        UsageJournal(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "lock"]


def no_space(fd: int, offset: int, length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_is_said_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    journal = UsageJournal(tmp_path, segment_bytes=SMALL)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_space)
        for number in range(100):
            assert journal.close_call(closed(number))
        journal.maintain()
        (line,) = caplog.messages
        assert "cannot grow (No space left on device)" in line and str(journal.folder) in line
        assert len(files(journal.folder)) == 1
    for number in range(100, 150):
        assert journal.close_call(closed(number))
    assert caplog.messages[1:] == [f"usage: {journal.folder}: the journal grows again"]
    assert drain(journal) == [closed(number) for number in range(150)]
    journal.close()


def test_memory_and_disk_are_bounded(tmp_path: Path) -> None:
    for journal in (
        UsageJournal(None, segment_bytes=SMALL, most_memory_segments=2),
        UsageJournal(tmp_path, segment_bytes=SMALL, most_segments=2),
    ):
        kept = [journal.close_call(closed(number)) for number in range(100)]
        assert journal.size_bytes == 2 * SMALL
        room = kept.index(False)
        assert 0 < room < 100 and not any(kept[room:])
        call = journal.open_call(opened(1))
        call.progress(1)
        assert not journal.close_call(closed(1), call)
        assert drain(journal) == [closed(number) for number in range(room)]
        journal.maintain()
        assert journal.close_call(closed(200))
        assert drain(journal) == [closed(200)]
        journal.close()


def test_a_record_without_end_is_refused(journal: UsageJournal) -> None:
    assert not journal.close_call(msgspec.structs.replace(closed(1), model="m" * 100_000))
    assert journal.close_call(closed(2))
    assert drain(journal) == [closed(2)]


def test_close_gives_back_what_lies_in_no_file() -> None:
    journal = UsageJournal(None, segment_bytes=SMALL)
    for number in range(100):
        journal.close_call(closed(number))
    batch = journal.unwritten(30)
    journal.written(batch)
    assert journal.close() == [closed(number) for number in range(30, 100)]


# Damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Closed]]:
    """A folder to write into, the only segment that it had, and what that holds."""
    root = tmp_path_factory.mktemp("damaged")
    journal = UsageJournal(root, segment_bytes=SMALL)
    journal.alive(1010.0)
    for number in range(8):
        call = journal.open_call(opened(number))
        call.progress(number)
        if number % 2:
            journal.close_call(closed(number), call)
    assert journal.folder is not None
    (file,) = files(journal.folder)
    content = file.read_bytes()
    journal.close()
    file.unlink()
    file.write_bytes(content)
    (left,) = left_journals(root)
    whole = {usage.request_id: usage for usage in recovered(left)}
    left.release()
    assert len(whole) == 8
    return file, content, whole


@given(at=st.integers(0, SMALL - 1), flip=st.integers(1, 255))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_damaged_byte_costs_one_record_at_most(
    damaged: tuple[Path, bytes, dict[str, Closed]], at: int, flip: int
) -> None:
    file, content, whole = damaged
    broken = bytearray(content)
    broken[at] ^= flip
    file.write_bytes(broken)
    usages = {usage.request_id: usage for usage in recovered(LeftJournal(file.parent, -1))}
    unlike = [name for name, usage in whole.items() if usages.get(name) != usage]
    if at >= 16:
        assert len(unlike) <= 1
    else:  # the time of the last sign of life: only how long the open ones lasted
        assert all(int(name[-1]) % 2 == 0 and name in usages for name in unlike)
    assert set(usages) <= set(whole)
    for name in unlike:
        if name in usages:
            # Either its end is lost, or its count: never more than was seen.
            assert usages[name].outcome is Outcome.ERROR
            assert usages[name].completion_tokens <= int(name[-1])


@given(size=st.integers(0, SMALL))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_a_file_that_ends_early_all_whole_records_are_read(
    damaged: tuple[Path, bytes, dict[str, Closed]], size: int
) -> None:
    file, content, whole = damaged
    file.write_bytes(content[:size])
    usages = {usage.request_id: usage for usage in recovered(LeftJournal(file.parent, -1))}
    file.write_bytes(content[:size].ljust(SMALL, b"\0"))
    padded = {usage.request_id: usage for usage in recovered(LeftJournal(file.parent, -1))}
    assert usages == padded
    if size >= 16:
        for name, usage in usages.items():
            assert usage == whole[name] or usage.outcome is Outcome.ERROR
    # The more of the file is there, the more records there are.
    expected = sum(content[:size].count(f"req_{number}".encode()) > 0 for number in range(8))
    assert expected - 1 <= len(usages) <= expected


@given(junk=st.binary(max_size=2 * SMALL))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_is_survived(damaged: tuple[Path, bytes, dict[str, Closed]], junk: bytes) -> None:
    file, _, _ = damaged
    file.write_bytes(junk)
    assert recovered(LeftJournal(file.parent, -1)) == []


def test_damage_is_said_once_with_its_place(
    damaged: tuple[Path, bytes, dict[str, Closed]], caplog: pytest.LogCaptureFixture
) -> None:
    file, content, whole = damaged
    broken = bytearray(content)
    place = content.index(b"req_3", content.index(b"req_3") + 1)  # of its end
    broken[place] ^= 1
    file.write_bytes(broken)
    usages = {usage.request_id: usage for usage in recovered(LeftJournal(file.parent, -1))}
    (line,) = caplog.messages
    start = int(line.split("bytes from ")[1].split(" ")[0])
    assert str(file) in line and start < place < start + 40
    assert usages["req_3"].outcome is Outcome.ERROR
    assert usages["req_3"].completion_tokens == 3
    assert {name for name in whole if usages[name] != whole[name]} == {"req_3"}


def test_the_second_of_two_segments_is_read_when_the_first_is_damaged(tmp_path: Path) -> None:
    journal = UsageJournal(tmp_path / "usage", segment_bytes=SMALL)
    for number in range(50):
        journal.close_call(closed(number))
    left = killed(journal, tmp_path)
    first, _ = files(left.folder)
    first.write_bytes(b"\xff" * SMALL)
    usages = recovered(left)
    assert 0 < len(usages) < 50 and usages[-1] == closed(49)
    journal.close()


# A process that is killed


CHILD = """
import sys
from pathlib import Path
from tests.gateway.metered import closed, opened
from expertmesh.gateway.usage_journal import UsageJournal

journal = UsageJournal(Path(sys.argv[1]), segment_bytes=4096)
stream = journal.open_call(opened(0))
number = 0
while True:
    number += 1
    call = journal.open_call(opened(number))
    call.progress(number)
    stream.progress(number)
    journal.close_call(closed(number), call)
    # From here on the client may have the last byte.
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
    if number % 50 == 0:
        journal.written(journal.unwritten(20))
        journal.maintain()
"""


@pytest.mark.parametrize("lines", [1, 29, 180])
def test_a_process_killed_while_it_writes_loses_no_answered_request(
    tmp_path: Path, lines: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
    )
    assert process.stdout is not None
    answered = 0
    while answered < lines:
        answered = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    answered = max([answered, *(int(line) for line in rest.splitlines(keepends=True) if line)])
    process.wait()
    process.stdout.close()
    (left,) = left_journals(tmp_path)
    usages = {usage.request_id: usage for usage in recovered(left)}
    taken = answered // 50 * 20  # went to the ledger, and may be there or freed
    for number in range(taken + 1, answered + 1):
        assert usages[f"req_{number}"] == closed(number)
    stream = usages["req_0"]
    assert stream.outcome is Outcome.ERROR
    assert stream.completion_tokens in (answered, answered + 1)
    left.delete()
