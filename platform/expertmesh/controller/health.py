"""Which steps of the loop fail, and for how long: the answer of /readyz."""

import logging
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_REPEATED = 3
"""Failures in a row of one step before the controller says that it is not ready."""


@dataclass(frozen=True, slots=True)
class _Failing:
    count: int
    message: str


class StepHealth:
    def __init__(self) -> None:
        self._failing: dict[str, _Failing] = {}

    def succeeded(self, step: str) -> None:
        failing = self._failing.pop(step, None)
        if failing is not None:
            _log.info("%s works again after %d failures", step, failing.count)

    def failed(self, step: str, error: str) -> None:
        """Logs the first failure in a row, and another message as soon as it differs."""
        known = self._failing.get(step)
        if known is None or known.message != error:
            _log.error("%s failed: %s", step, error)
        self._failing[step] = _Failing((known.count if known else 0) + 1, error)

    def failing(self) -> dict[str, int]:
        """By step, failures in a row."""
        return {step: failing.count for step, failing in sorted(self._failing.items())}

    def repeated(self) -> dict[str, str]:
        return {
            step: f"failed {failing.count} times in a row: {failing.message}"
            for step, failing in sorted(self._failing.items())
            if failing.count >= _REPEATED
        }
