"""Read request traces: CSV files whose header says what they are."""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from expertmesh.errors import SetupError
from expertmesh.simulator.sampling import Gaps, ServeGenClients
from expertmesh.simulator.workload import Floats, Requests

_Number = int | float
_MOST_TOKENS = 100_000_000
_LAWS = {"gamma": Gaps.GAMMA, "weibull": Gaps.WEIBULL}
_CLIENTS_ENDING = "_clients.csv"
_WINDOWS_ENDING = "_10min.csv"


def read_trace(path: str | Path) -> Requests | ServeGenClients:
    """The formats, by header; columns in brackets may be left out, and their order is free:

    * `TIMESTAMP,ContextTokens,GeneratedTokens`: Azure's public traces of language models
    * `t_ms,input_tokens,output_tokens[,client]`: aibrix's and ServeGen's samples
    * `at_s,prompt_tokens,output_tokens[,cached_tokens][,client]`: ExpertMesh's own
    * `client,t_s,req_per_s,cv,pattern,p1,p2`: ServeGen's statistics of clients; the mean lengths
      come from the file beside it whose name ends in `_10min.csv` instead of `_clients.csv`

    Raises SetupError, which names the file, line, column, value and remedy.
    """
    path = Path(path)
    header = _header(path)
    if set(header) == _CLIENT_COLUMNS.keys():
        return _read_clients(path)
    for format_ in _FORMATS:
        if format_.fits(header):
            return _read_requests(path, format_)
    raise SetupError(
        f"{path}: line 1: unknown columns {','.join(header)!r}: "
        f"use one of {'; '.join(format_.shown for format_ in _FORMATS)}; "
        f"{','.join(_CLIENT_COLUMNS)}"
    )


def _tokens(text: str) -> int:
    value = int(text)
    if not 0 <= value <= _MOST_TOKENS:
        raise ValueError("give a count of tokens, 0 or more")
    return value


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("give a whole number, 0 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError("give a number, 0 or more")
    return value


def _above_zero(text: str) -> float:
    value = _positive(text)
    if value == 0.0:
        raise ValueError("give a number above 0")
    return value


def _milliseconds(text: str) -> float:
    return _positive(text) / 1000.0


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _law(text: str) -> int:
    return _LAWS.get(text.lower(), Gaps.EXPONENTIAL)


_Convert = Callable[[str], _Number]
_REMEDIES: dict[_Convert, str] = {
    _tokens: "give a count of tokens, 0 or more",
    _number: "give a whole number, 0 or more",
    _positive: "give a number, 0 or more",
    _above_zero: "give a number above 0",
    _milliseconds: "give milliseconds, 0 or more",
    _moment: "give a date and time such as 2023-11-16 18:17:03.98",
}


@dataclass(frozen=True, slots=True)
class _Format:
    at: tuple[str, _Convert]
    prompt: str
    output: str
    optional: dict[str, _Convert]
    from_first: bool = False
    """Times count from that of the first request."""

    @property
    def shown(self) -> str:
        needed = ",".join((self.at[0], self.prompt, self.output))
        return needed + "".join(f"[,{name}]" for name in self.optional)

    def fits(self, header: tuple[str, ...]) -> bool:
        needed = {self.at[0], self.prompt, self.output}
        return needed <= set(header) <= needed | self.optional.keys()

    def columns(self, header: tuple[str, ...]) -> dict[str, _Convert]:
        known = {self.at[0]: self.at[1], self.prompt: _tokens, self.output: _tokens}
        known |= self.optional
        return {name: known[name] for name in header}


_FORMATS = (
    _Format(("TIMESTAMP", _moment), "ContextTokens", "GeneratedTokens", {}, from_first=True),
    _Format(("t_ms", _milliseconds), "input_tokens", "output_tokens", {"client": _number}),
    _Format(
        ("at_s", _positive),
        "prompt_tokens",
        "output_tokens",
        {"cached_tokens": _tokens, "client": _number},
    ),
)
_CLIENT_COLUMNS: dict[str, _Convert] = {
    "client": _number,
    "t_s": _positive,
    "req_per_s": _positive,
    "cv": _positive,
    "pattern": _law,
    "p1": _above_zero,
    "p2": _positive,
}
_WINDOW_COLUMNS: dict[str, _Convert] = {
    "t_s": _positive,
    "mean_in_tokens": _above_zero,
    "mean_out_tokens": _above_zero,
}


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}: give a file that exists") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"{path}: not a CSV file ({error}): give a trace as text") from error


def _header(path: Path) -> tuple[str, ...]:
    for line in _lines(path):
        return tuple(name.strip() for name in line)
    raise SetupError(f"{path}: empty: its first line must name the columns")


def _read(path: Path, columns: dict[str, _Convert], others: bool = False) -> dict[str, Floats]:
    """`others`: columns that are not asked for are allowed, and ignored."""
    lines = _lines(path)
    header = [name.strip() for name in next(lines, [])]
    missing = [name for name in columns if name not in header]
    if missing:
        raise SetupError(f"{path}: line 1: column {missing[0]!r} is missing: add it")
    if len(set(header)) < len(header):
        raise SetupError(f"{path}: line 1: {','.join(header)!r}: name each column once")
    places = [(header.index(name), name, convert) for name, convert in columns.items()]
    values: dict[str, list[_Number]] = {name: [] for name in columns}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        if len(line) != len(header):
            raise SetupError(
                f"{path}: line {number}: {len(line)} values for {len(header)} columns: "
                "give one value for each column"
            )
        for place, name, convert in places:
            try:
                value = convert(line[place])
            except (ValueError, OverflowError) as error:
                remedy = _REMEDIES.get(convert, str(error))
                raise SetupError(
                    f"{path}: line {number}: {name}: {line[place]!r}: {remedy}"
                ) from error
            values[name].append(value)
    return {name: np.array(column, dtype=np.float64) for name, column in values.items()}


def _read_requests(path: Path, format_: _Format) -> Requests:
    columns = _read(path, format_.columns(_header(path)))
    at_s = columns[format_.at[0]]
    if not len(at_s):
        raise SetupError(f"{path}: no requests: give a trace with at least one")
    if format_.from_first:
        at_s = at_s - at_s.min()
    cached, client = columns.get("cached_tokens"), columns.get("client")
    return Requests.of(
        at_s,
        columns[format_.prompt].astype(np.int64),
        columns[format_.output].astype(np.int64),
        None if cached is None else cached.astype(np.int64),
        None if client is None else client.astype(np.int64),
    )


def _read_clients(path: Path) -> ServeGenClients:
    rows = _read(path, _CLIENT_COLUMNS)
    if not path.name.endswith(_CLIENTS_ENDING):
        raise SetupError(
            f"{path}: statistics of clients need the mean lengths from a file beside them: "
            f"name the two …{_CLIENTS_ENDING} and …{_WINDOWS_ENDING}"
        )
    windows_path = path.with_name(path.name.removesuffix(_CLIENTS_ENDING) + _WINDOWS_ENDING)
    windows = _read(windows_path, _WINDOW_COLUMNS, others=True)
    start_s = windows["t_s"]
    if not len(start_s):
        raise SetupError(f"{windows_path}: no windows: give the mean lengths of each")
    window_s = float(start_s[1] - start_s[0]) if len(start_s) > 1 else 600.0
    if window_s <= 0.0 or np.any(np.abs(np.diff(start_s) - window_s) > 1e-6):
        raise SetupError(f"{windows_path}: t_s: windows must follow one another at equal distances")
    unknown = ~np.isin(rows["t_s"], start_s)
    if unknown.any():
        line = int(np.argmax(unknown)) + 2
        raise SetupError(
            f"{path}: line {line}: t_s: {rows['t_s'][unknown][0]:g}: "
            f"{windows_path.name} has no such window: add it there"
        )
    first_s = start_s[0]
    return ServeGenClients(
        rows["client"].astype(np.int64),
        rows["t_s"] - first_s,
        rows["req_per_s"],
        rows["cv"],
        rows["pattern"].astype(np.int64),
        rows["p1"],
        start_s - first_s,
        windows["mean_in_tokens"],
        windows["mean_out_tokens"],
        window_s,
    )
