import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.errors import SetupError
from expertmesh.telemetry import shared_tally
from expertmesh.telemetry.metrics import Metric
from expertmesh.telemetry.shared_tally import TallyCollector, TallyFolder
from expertmesh.telemetry.tally import Tally

ROOT = Path(__file__).parents[2]
REQUESTS = Metric("em_requests_total", "counter", "Requests", ("model",))
QUEUED = Metric("em_queued", "gauge", "Queued")
WAIT = Metric("em_wait_seconds", "histogram", "Wait", (), (0.1, 1.0))


class Worker:
    def __init__(self, folder: Path) -> None:
        tally = Tally()
        self.requests = tally.counter(REQUESTS).labels("a")
        self.queued = tally.gauge(QUEUED).labels()
        self.wait = tally.histogram(WAIT).labels()
        self.collector = TallyCollector(tally, TallyFolder(folder))
        self._registry = CollectorRegistry()
        self._registry.register(self.collector)

    def scraped(self) -> dict[str, float]:
        """Requests, queued, and observations in all."""
        exposed = generate_latest(self._registry).decode()
        samples = [s for f in text_string_to_metric_families(exposed) for s in f.samples]
        names = ("em_requests_total", "em_queued", "em_wait_seconds_count")
        return {s.name: s.value for s in samples if s.name in names}


def test_whichever_worker_is_asked_tells_the_sum(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    first.requests.inc(3)
    first.queued.set(2)
    first.wait.observe(0.5)
    second.requests.inc(4)
    second.queued.set(1)
    second.collector.write()
    expected = {"em_requests_total": 7.0, "em_queued": 3.0, "em_wait_seconds_count": 1.0}
    assert first.scraped() == expected
    assert second.scraped() == expected  # the scrape of the first wrote its values


def test_the_counts_of_an_ended_worker_stay_and_its_gauges_go(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    second.requests.inc(4)
    second.queued.set(9)
    second.wait.observe(0.5)
    second.collector.close()
    expected = {"em_requests_total": 4.0, "em_queued": 0.0, "em_wait_seconds_count": 1.0}
    for _ in range(3):
        assert first.scraped() == expected
    assert {path.name.split(".")[-1] for path in tmp_path.iterdir()} == {
        "lock",
        "retired",
        "snapshot",
    }
    assert len(list(tmp_path.iterdir())) == 4
    # Also when the last one has ended and a new one comes.
    first.requests.inc()
    first.collector.close()
    assert Worker(tmp_path).scraped()["em_requests_total"] == 5.0


CHILD = """
import sys, time
from pathlib import Path
from tests.telemetry.test_shared_tally import Worker

worker = Worker(Path(sys.argv[1]))
worker.requests.inc(4)
worker.queued.set(9)
worker.scraped()
print("scraped", flush=True)
time.sleep(60)
"""


def test_what_a_killed_worker_has_shown_never_falls(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"scraped\n"
    assert first.scraped()["em_queued"] == 9.0
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert first.scraped() == {
        "em_requests_total": 4.0,
        "em_queued": 0.0,
        "em_wait_seconds_count": 0.0,
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(6))
def test_a_kill_while_retiring_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    first, second, third = Worker(tmp_path), Worker(tmp_path), Worker(tmp_path)
    for worker, count in ((second, 4), (third, 8)):
        worker.requests.inc(count)
        worker.collector.close()
    steps = 0

    def deadly(action: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: object, **named: object) -> None:
            nonlocal steps
            if steps == step:
                raise Killed
            steps += 1
            action(*arguments, **named)

        return act

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", deadly(os.replace))
        killed.setattr(Path, "unlink", deadly(Path.unlink))
        with pytest.raises(Killed):
            first.scraped()
    for _ in range(2):
        assert first.scraped()["em_requests_total"] == 12.0
    assert Worker(tmp_path).scraped()["em_requests_total"] == 12.0


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SetupError, match=r"file/metrics: workers cannot share .*; name a folder"):
        TallyFolder(blocked / "metrics")


def test_a_folder_that_is_lost_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(tmp_path / "metrics")
    worker.requests.inc()
    shutil.rmtree(tmp_path / "metrics")
    for _ in range(3):
        worker.collector.write()
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.text
    assert worker.scraped()["em_requests_total"] == 1.0


def test_damaged_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, ended = Worker(tmp_path), Worker(tmp_path), Worker(tmp_path)
    first.requests.inc()
    second.requests.inc(4)
    second.collector.write()
    ended.requests.inc(8)
    ended.collector.close()
    assert first.scraped()["em_requests_total"] == 13.0
    (tmp_path / "retired").write_bytes(b"\xc1junk")
    (snapshot,) = (p for p in tmp_path.glob("*.snapshot") if p.name != own_name(first))
    snapshot.write_bytes(b"")
    assert first.scraped()["em_requests_total"] == 1.0
    assert "retired: cannot be read and starts anew" in caplog.text
    assert "is left out" in caplog.text


def own_name(worker: Worker) -> str:
    folder = worker.collector._folder
    assert folder is not None
    return f"{folder._name}{shared_tally._SNAPSHOT}"
