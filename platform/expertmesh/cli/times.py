"""Times as a person writes them on the command line, and as the tables show them."""

import re
from datetime import UTC, datetime

import typer

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_DURATION = re.compile(r"(\d{1,6})([smhdw])")


def duration_s(text: str) -> float:
    """`30d` and its like."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r}: write a number and s, m, h, d or w, e.g. 30d")
    return float(int(match[1]) * _SECONDS[match[2]])


def moment_s(text: str, now_s: float) -> float:
    """A date or time (UTC unless it says otherwise), or how long ago, as Unix time."""
    if _DURATION.fullmatch(text.strip()):
        return now_s - duration_s(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: write a date such as 2026-01-31, a time such as 2026-01-31T12:00, or how "
            "long ago, e.g. 7d"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def shown(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
