"""One running system for all tests that only use it; those that break things start their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.running_system import RunningSystem, running_system

_HERE = Path(__file__).parent
_SHARING = ("test_console.py", "test_served_model.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that share a system come last of all, so that it runs beside no other."""
    items.sort(key=lambda item: item.path.parent == _HERE and item.path.name in _SHARING)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running_system(tmp_path_factory.mktemp("system"), groups=(1, 1)) as started:
        started.until_groups(1)
        yield started


@pytest.fixture(scope="session")
def key(system: RunningSystem) -> str:
    return system.new_key("tests")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
