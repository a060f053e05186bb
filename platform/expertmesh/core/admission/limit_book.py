"""Accounts and what they have used: reserve before a request runs, settle when it has."""

from typing import Final

from expertmesh.core.admission.bucket import Bucket
from expertmesh.core.admission.reservation import (
    PICO_PER_USD,
    Estimate,
    Headroom,
    LimitKind,
    Refused,
    Reserved,
    pico_of_usd,
)
from expertmesh.core.admission.window import Window, day_of, day_start_s, month_of
from expertmesh.core.domain.tenant import Account, Limits

__all__ = [
    "PICO_PER_USD",
    "Estimate",
    "Headroom",
    "LimitBook",
    "LimitKind",
    "Refused",
    "Reserved",
    "pico_of_usd",
]

_NO_HEADROOM = Reserved(None)
_NO_LIMITS = Limits()
_BUSY_RETRY_S = 1.0
"""Nobody knows when another request of the account will end."""


class _Record:
    """One account."""

    __slots__ = (
        "concurrent",
        "current",
        "day",
        "day_pico",
        "limits",
        "month",
        "month_first_day",
        "month_pico",
        "name",
        "open",
        "requests",
        "tokens",
        "window_day",
    )

    def __init__(self, name: str, day: int, month_first_day: int) -> None:
        self.name = name
        self.limits = _NO_LIMITS
        self.open = 0
        self.concurrent: int | None = None
        self.day_pico: int | None = None
        self.month_pico: int | None = None
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.day = Window()
        self.month = Window()
        self.window_day = day
        self.month_first_day = month_first_day
        self.current: _Charge = (self, self.tokens, self.day, self.month)


_Charge = tuple[_Record, Bucket | None, Window, Window]
"""An account, and what of it a reservation counts in; it settles there and nowhere else."""


class LimitBook:
    """All or nothing over all accounts of a request; money is never committed above a budget.

    `now_s` is Unix time everywhere; one that lies before the latest seen counts as that one.
    """

    def __init__(self, reservation_s: float = 3600.0) -> None:
        """Reservations that are older than `reservation_s` may be expired."""
        self._reservation_s: Final = reservation_s
        self._records: dict[str, _Record] = {}
        self._open: dict[str, tuple[int, int, float, list[_Charge]]] = {}
        self._now_s = 0.0
        self._day = -1
        self._day_end_s = 0.0
        self._month_first_day = -1
        self._month_end_day = -1
        self.clipped_pico_usd = 0
        """What settlements were above their reservations, and not charged: a fault elsewhere."""

    @property
    def open_reservations(self) -> int:
        return len(self._open)

    def reserve(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> Reserved | Refused:
        """Ids are unique; an open reservation of the same id is forfeited first."""
        if now_s >= self._now_s:
            self._now_s = now_s
            if now_s >= self._day_end_s:
                self._turn_day(now_s)
        else:
            now_s = self._now_s
        if reservation_id in self._open:
            self.forfeit(reservation_id)
        tokens = estimate.tokens
        pico = estimate.pico_usd
        records = self._records
        charges: list[_Charge] = []
        # Calls of other functions would cost as much as all the rest of this one.
        for account in accounts:
            record = records.get(account.name)
            if (
                record is None
                or record.limits is not account.limits
                or record.window_day != self._day
            ):
                record = self._bring_up_to_date(account, now_s)
            if record.concurrent is not None and record.open >= record.concurrent:
                return self._refused(accounts, estimate, now_s)
            bucket = record.requests
            if bucket is not None:
                used = bucket.used - (now_s - bucket.at_s) * bucket.per_s
                bucket.used = used = used if used > 0.0 else 0.0
                bucket.at_s = now_s
                if used + 1 > bucket.capacity:
                    return self._refused(accounts, estimate, now_s)
            charge = record.current
            bucket = charge[1]
            if bucket is not None:
                used = bucket.used - (now_s - bucket.at_s) * bucket.per_s
                bucket.used = used = used if used > 0.0 else 0.0
                bucket.at_s = now_s
                if used + tokens > bucket.capacity and (used or not bucket.capacity):
                    return self._refused(accounts, estimate, now_s)
            if (
                record.day_pico is not None
                and charge[2].committed_pico_usd + pico > record.day_pico
            ) or (
                record.month_pico is not None
                and charge[3].committed_pico_usd + pico > record.month_pico
            ):
                return self._refused(accounts, estimate, now_s)
            charges.append(charge)
        return self._count(reservation_id, tokens, pico, now_s, charges)

    def adopt(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> None:
        """Count what another book has granted before it was lost, whether or not there is room."""
        now_s = self._see(now_s)
        if reservation_id not in self._open:
            charges = [self._bring_up_to_date(account, now_s).current for account in accounts]
            self._count(reservation_id, estimate.tokens, estimate.pico_usd, now_s, charges)

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> bool:
        """False for an id that is not open: a second settlement changes nothing.

        Money above the reservation is not charged, but counted in `clipped_pico_usd`.
        """
        reservation = self._open.pop(reservation_id, None)
        if reservation is None:
            return False
        reserved_tokens, reserved_pico, _, charges = reservation
        if pico_usd > reserved_pico:
            self.clipped_pico_usd += pico_usd - reserved_pico
            pico_usd = reserved_pico
        back_pico = reserved_pico - pico_usd
        back_tokens = reserved_tokens - tokens
        for record, bucket, day, month in charges:
            record.open -= 1
            day.committed_pico_usd -= back_pico
            month.committed_pico_usd -= back_pico
            if bucket is not None:
                if back_tokens >= 0:
                    # Whether the refill until now comes before or after makes no difference.
                    used = bucket.used - back_tokens
                    bucket.used = used if used > 0.0 else 0.0
                else:
                    bucket.correct(-back_tokens, max(now_s, bucket.at_s))
        return True

    def forfeit(self, reservation_id: str) -> bool:
        """Settle at the estimate, for a request of which nobody can tell what it used."""
        reservation = self._open.pop(reservation_id, None)
        if reservation is None:
            return False
        for record, _, _, _ in reservation[3]:
            record.open -= 1
        return True

    def expire(self, now_s: float) -> int:
        """Forfeit the reservations that are too old: their workers are lost. Returns how many."""
        made_before_s = now_s - self._reservation_s
        old = []
        for reservation_id, (_, _, made_at_s, _) in self._open.items():
            if made_at_s > made_before_s:
                break  # They are in the order in which they were made.
            old.append(reservation_id)
        for reservation_id in old:
            self.forfeit(reservation_id)
        return len(old)

    def seed(self, account: str, day_pico_usd: int, month_pico_usd: int, now_s: float) -> None:
        """Add what the ledger says was spent in the running UTC day and month.

        A window takes this once; what is reserved before it comes is counted on top.
        """
        self._see(now_s)
        record = self._current_record(account)
        for window, spent_pico in ((record.day, day_pico_usd), (record.month, month_pico_usd)):
            if not window.seeded:
                window.committed_pico_usd += spent_pico
                window.seeded = True

    def committed_pico_usd(self, account: str) -> tuple[int, int]:
        """Spent and reserved of the running day and month, as of the latest time seen."""
        if account not in self._records:
            return 0, 0
        record = self._current_record(account)
        return record.day.committed_pico_usd, record.month.committed_pico_usd

    def _count(
        self,
        reservation_id: str,
        tokens: int,
        pico: int,
        now_s: float,
        charges: list[_Charge],
    ) -> Reserved:
        by_requests: Bucket | None = None
        by_tokens: Bucket | None = None
        left_requests = left_tokens = 0.0
        for record, bucket, day, month in charges:
            record.open += 1
            day.committed_pico_usd += pico
            month.committed_pico_usd += pico
            if bucket is not None:
                bucket.used = used = bucket.used + tokens
                left = bucket.capacity - used
                if by_tokens is None or left < left_tokens:
                    by_tokens = bucket
                    left_tokens = left
            bucket = record.requests
            if bucket is not None:
                bucket.used = used = bucket.used + 1
                left = bucket.capacity - used
                if by_requests is None or left < left_requests:
                    by_requests = bucket
                    left_requests = left
        self._open[reservation_id] = (tokens, pico, now_s, charges)
        headroom = _headroom(by_requests, by_tokens)
        return _NO_HEADROOM if headroom is None else Reserved(headroom)

    def _see(self, now_s: float) -> float:
        """Returns the time that counts."""
        now_s = max(now_s, self._now_s)
        self._now_s = now_s
        if now_s >= self._day_end_s:
            self._turn_day(now_s)
        return now_s

    def _turn_day(self, now_s: float) -> None:
        day = day_of(now_s)
        self._day = day
        self._day_end_s = float(day_start_s(day + 1))
        if day >= self._month_end_day:
            self._month_first_day, self._month_end_day = month_of(day)
            # Who has not been seen for all of last month has nothing left to remember.
            self._records = {
                name: record
                for name, record in self._records.items()
                if record.open or record.window_day >= self._month_first_day - 28
            }

    def _bring_up_to_date(self, account: Account, now_s: float) -> _Record:
        record = self._current_record(account.name)
        limits = account.limits
        if record.limits != limits:
            record.concurrent = limits.concurrent_requests
            record.day_pico = _pico(limits.usd_per_day)
            record.month_pico = _pico(limits.usd_per_month)
            record.requests = _resized(record.requests, limits.requests_per_min, now_s)
            record.tokens = _resized(record.tokens, limits.tokens_per_min, now_s)
            record.current = (record, record.tokens, record.day, record.month)
        # An equal one too: from now on the comparison by identity suffices.
        record.limits = limits
        return record

    def _current_record(self, name: str) -> _Record:
        """Of an account, in the windows of today."""
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = _Record(name, self._day, self._month_first_day)
        elif record.window_day != self._day:
            record.day = Window()
            record.window_day = self._day
            if record.month_first_day != self._month_first_day:
                record.month = Window()
                record.month_first_day = self._month_first_day
            record.current = (record, record.tokens, record.day, record.month)
        return record

    def _refused(self, accounts: tuple[Account, ...], estimate: Estimate, now_s: float) -> Refused:
        """The limit that will be in the way for longest."""
        records = [self._bring_up_to_date(account, now_s) for account in accounts]
        kind, name, limit, longest_s = LimitKind.UNAVAILABLE, "", 0.0, -1.0
        for record in records:
            for one_kind, one_limit, wait_s in self._waits(record, estimate, now_s):
                if wait_s > longest_s:
                    kind, name, limit, longest_s = one_kind, record.name, one_limit, wait_s
        return Refused(
            kind,
            name,
            limit,
            longest_s,
            _headroom(
                _tightest([record.requests for record in records]),
                _tightest([record.tokens for record in records]),
            ),
        )

    def _waits(
        self, record: _Record, estimate: Estimate, now_s: float
    ) -> list[tuple[LimitKind, float, float]]:
        """The limits that refuse: their kind, size and how long they will."""
        waits: list[tuple[LimitKind, float, float]] = []
        requests, tokens, limits = record.requests, record.tokens, record.limits
        if requests is not None and (wait_s := requests.wait_s(1, now_s)) > 0.0:
            waits.append((LimitKind.REQUESTS_PER_MIN, requests.capacity, wait_s))
        if tokens is not None and (wait_s := tokens.wait_s(estimate.tokens, now_s)) > 0.0:
            waits.append((LimitKind.TOKENS_PER_MIN, tokens.capacity, wait_s))
        if record.concurrent is not None and record.open >= record.concurrent:
            waits.append((LimitKind.CONCURRENT_REQUESTS, record.concurrent, _BUSY_RETRY_S))
        for kind, usd, budget, window, end_s in (
            (
                LimitKind.USD_PER_DAY,
                limits.usd_per_day,
                record.day_pico,
                record.day,
                self._day_end_s,
            ),
            (
                LimitKind.USD_PER_MONTH,
                limits.usd_per_month,
                record.month_pico,
                record.month,
                day_start_s(self._month_end_day),
            ),
        ):
            if (
                usd is not None
                and budget is not None
                and window.committed_pico_usd + estimate.pico_usd > budget
            ):
                waits.append((kind, usd, end_s - now_s))
        return waits


def _pico(usd: float | None) -> int | None:
    return None if usd is None else pico_of_usd(usd)


def _resized(bucket: Bucket | None, capacity: int | None, now_s: float) -> Bucket | None:
    """What has been used stays used, but a limit that was lifted begins anew."""
    if capacity is None:
        return None
    if bucket is None:
        return Bucket(capacity, now_s)
    bucket.resize(capacity, now_s)
    return bucket


def _tightest(buckets: list[Bucket | None]) -> Bucket | None:
    return min(
        (bucket for bucket in buckets if bucket is not None),
        key=lambda bucket: bucket.capacity - bucket.used,
        default=None,
    )


def _headroom(requests: Bucket | None, tokens: Bucket | None) -> Headroom | None:
    if requests is None:
        if tokens is None:
            return None
        left = tokens.capacity - tokens.used
        return Headroom(
            None, None, None, tokens.capacity, int(left) if left > 0.0 else 0, tokens.reset_s()
        )
    left = requests.capacity - requests.used
    left_requests = int(left) if left > 0.0 else 0
    if tokens is None:
        return Headroom(requests.capacity, left_requests, requests.reset_s(), None, None, None)
    left = tokens.capacity - tokens.used
    return Headroom(
        requests.capacity,
        left_requests,
        requests.reset_s(),
        tokens.capacity,
        int(left) if left > 0.0 else 0,
        tokens.reset_s(),
    )
