"""One answer to /metrics for several workers behind one port, whichever of them is asked.

Each worker keeps its snapshot in a folder that all share. The counts of a worker that has ended are
added to the file `retired` by whoever notices, so no total ever falls.
"""

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from prometheus_client.metrics_core import Metric as Exposed
from prometheus_client.registry import Collector

from expertmesh.errors import SetupError
from expertmesh.telemetry.metrics import Metric
from expertmesh.telemetry.tally import Snapshot, Tally, decode, encode, exposition, lasting, merge

_log = logging.getLogger(__name__)

_PREFIX = "worker-"
_LOCK = ".lock"
_SNAPSHOT = ".snapshot"
_NEW = ".new"


class _Retired(msgspec.Struct, array_like=True):
    counts: Snapshot
    workers: list[str]
    """Those in it of which files may still be there: whoever wrote this may have been killed
    before it deleted them."""


_decode_retired = msgspec.msgpack.Decoder(_Retired).decode
_NOTHING = Snapshot([], [], [])


class TallyCollector(Collector):
    """Register it; its metrics are the tally's alone, or with a folder those of all workers."""

    def __init__(self, tally: Tally, folder: "TallyFolder | None" = None) -> None:
        self._tally = tally
        self._folder = folder
        self.refresh: Callable[[], None] = _nothing
        """Called before values are read, to set gauges."""

    def describe(self) -> Iterable[Exposed]:
        return exposition(_NOTHING, self._tally.metrics)

    def collect(self) -> Iterable[Exposed]:
        return exposition(*self.read())

    def read(self) -> tuple[Snapshot, tuple[Metric, ...]]:
        """The values of this moment, and the metrics that they belong to."""
        metrics = self._tally.metrics
        self.refresh()
        own = self._tally.snapshot()
        if self._folder is None:
            return own, metrics
        # What is shown must not be lost when this worker is killed a moment later.
        self._folder.write(own)
        return merge((own, *self._folder.others(metrics)), metrics), metrics

    def write(self) -> None:
        """Once a second: what others show of this worker."""
        if self._folder is not None:
            self.refresh()
            self._folder.write(self._tally.snapshot())

    def close(self) -> None:
        """The last write: another worker adds these counts to the retired ones."""
        if self._folder is not None:
            self.write()
            self._folder.close()


class TallyFolder:
    """A worker's place among the others. Fork before opening, not after."""

    def __init__(self, folder: Path) -> None:
        """Raises SetupError when the folder cannot be used."""
        self._folder = folder
        self._failing = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._held():
                self._lock_fd, path = tempfile.mkstemp(_LOCK, _PREFIX, folder)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError(
                f"{folder}: workers cannot share their metrics there: {_reason(error)}; name a "
                "folder that this user may write"
            ) from error
        self._name = Path(path).name.removesuffix(_LOCK)

    def write(self, snapshot: Snapshot) -> None:
        """A folder that cannot be written is said once; metrics never stop a worker."""
        try:
            _replace(self._folder / f"{self._name}{_SNAPSHOT}", encode(snapshot))
        except OSError as error:
            if not self._failing:
                _log.error("metrics: %s: cannot be written: %s", self._folder, _reason(error))
            self._failing = True
        else:
            self._failing = False

    def others(self, metrics: Iterable[Metric]) -> list[Snapshot]:
        """Of the living ones, and the sum of those that have ended."""
        try:
            with self._held():
                retired, living = self._retire(tuple(metrics))
                return [retired, *filter(None, (self._read(name) for name in living))]
        except OSError as error:
            _log.error("metrics: %s: cannot be read: %s", self._folder, _reason(error))
            return []

    def close(self) -> None:
        """After the last `write`."""
        os.close(self._lock_fd)

    def _retire(self, metrics: tuple[Metric, ...]) -> tuple[Snapshot, list[str]]:
        retired = self._read_retired()
        living: list[str] = []
        ended: list[str] = []
        for path in sorted(self._folder.glob(f"{_PREFIX}*{_LOCK}")):
            name = path.name.removesuffix(_LOCK)
            if name != self._name:
                (ended if _is_free(path) else living).append(name)
        if not ended:
            return retired.counts, living
        added = [name for name in ended if name not in retired.workers]
        counts = [lasting(snapshot) for name in added if (snapshot := self._read(name))]
        total = merge((retired.counts, *counts), metrics)
        # `ended` names all whose files may remain: were this killed now, none would count twice.
        data = msgspec.msgpack.encode(_Retired(total, ended))
        _replace(self._folder / "retired", data)
        for name in ended:
            for suffix in (_NEW, _SNAPSHOT, _LOCK):
                (self._folder / f"{name}{suffix}").unlink(missing_ok=True)
        return total, living

    def _read_retired(self) -> _Retired:
        path = self._folder / "retired"
        try:
            return _decode_retired(path.read_bytes())
        except FileNotFoundError:
            return _Retired(_NOTHING, [])
        except msgspec.MsgspecError as error:
            _log.error("metrics: %s: cannot be read and starts anew: %s", path, error)
            return _Retired(_NOTHING, [])

    def _read(self, name: str) -> Snapshot | None:
        path = self._folder / f"{name}{_SNAPSHOT}"
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            return None  # it has not written one yet
        except msgspec.MsgspecError as error:
            _log.error("metrics: %s: is left out: %s", path, error)
            return None

    @contextmanager
    def _held(self) -> Iterator[None]:
        file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _nothing() -> None:
    pass


def _is_free(lock: Path) -> bool:
    """Its worker has ended."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    finally:
        os.close(file)
    return True


def _replace(path: Path, data: bytes) -> None:
    """Readers see the old content or the new, never a part."""
    new = path.with_suffix(_NEW)
    new.write_bytes(data)
    os.replace(new, path)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
