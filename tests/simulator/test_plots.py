import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.simulator.small import Script, load, option, scenario

from expertmesh.errors import SetupError
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.oracle import Least, least_cost, problem
from expertmesh.simulator.outcome import Outcome
from expertmesh.simulator.plots import plot

LOAD = load(*[0.0] * 20, *[40.0] * 400)
TWO = scenario(option(), option("spot", 12.0), initial_groups=(1, 1))


def outcomes(count: int) -> list[Outcome]:
    outcome = simulate_fluid(TWO, LOAD, Script)
    return [replace(outcome, policy=f"policy {n}") for n in range(count)]


def size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_a_page_grows_with_the_policies(tmp_path: Path) -> None:
    least = least_cost(problem(TWO, LOAD))
    assert isinstance(least, Least)
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    plot(one, outcomes(1), least)
    plot(three, outcomes(3))
    assert size(one)[0] == size(three)[0]
    assert size(three)[1] - size(one)[1] == 520


def test_a_week_takes_no_more_points_than_can_be_seen(tmp_path: Path) -> None:
    long = load(*(20 + 10 * np.sin(np.arange(6000) / 300)))
    plot(tmp_path / "week.png", [simulate_fluid(TWO, long, Script)])
    assert size(tmp_path / "week.png")[0] == 1500


def test_nothing_that_arrives_can_be_plotted(tmp_path: Path) -> None:
    plot(tmp_path / "none.png", [simulate_fluid(TWO, load(*[0.0] * 10), Script)])
    assert size(tmp_path / "none.png")[0] == 1500


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "plot.png"
    with pytest.raises(SetupError, match=r"missing/plot\.png: cannot be written: No such file"):
        plot(file, outcomes(1))
