"""The limits once more, slowly: every sum is made anew from all reservations there ever were."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction

from expertmesh.core.domain.tenant import Account, Limits


@dataclass
class Level:
    """A token bucket in the usual form, and a debt beside it."""

    capacity: int
    left: Fraction
    owed: Fraction = Fraction(0)

    def refill(self, elapsed_s: Fraction) -> None:
        new = elapsed_s * self.capacity / 60
        paid = min(new, self.owed)
        self.owed -= paid
        self.left = min(Fraction(self.capacity), self.left + new - paid)

    def fits(self, amount: int) -> bool:
        if self.owed or (self.capacity == 0 and amount):
            return False
        return amount <= self.left or (amount > self.capacity and self.left == self.capacity)

    def take(self, amount: int) -> None:
        taken = min(Fraction(amount), self.left)
        self.left -= taken
        self.owed += amount - taken

    def put(self, amount: int) -> None:
        paid = min(Fraction(amount), self.owed)
        self.owed -= paid
        self.left = min(Fraction(self.capacity), self.left + amount - paid)

    def resize(self, capacity: int) -> None:
        used = self.capacity - self.left + self.owed
        self.capacity = capacity
        self.left = max(Fraction(0), capacity - used)
        self.owed = max(Fraction(0), used - capacity)


@dataclass
class Reservation:
    accounts: tuple[str, ...]
    tokens: int
    pico_usd: int
    made_at_s: int
    levels: tuple[Level | None, ...]
    open: bool = True


@dataclass
class Model:
    now_s: int
    reservations: dict[str, Reservation] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)
    requests: dict[str, Level | None] = field(default_factory=dict)
    tokens: dict[str, Level | None] = field(default_factory=dict)
    seeds: dict[tuple[str, str], int] = field(default_factory=dict)
    """By account and day (2026-01-31) or month (2026-01)."""

    def advance(self, elapsed_s: int) -> None:
        self.now_s += elapsed_s
        for level in (*self.requests.values(), *self.tokens.values()):
            if level is not None:
                level.refill(Fraction(elapsed_s))

    def apply(self, account: Account) -> None:
        name, limits = account.name, account.limits
        self.limits[name] = limits
        _resize(self.requests, name, limits.requests_per_min)
        _resize(self.tokens, name, limits.tokens_per_min)

    def seed(self, account: str, day_pico: int, month_pico: int) -> None:
        self.seeds.setdefault((account, self.today), day_pico)
        self.seeds.setdefault((account, self.today[:7]), month_pico)

    @property
    def today(self) -> str:
        return _date(self.now_s)

    def committed(self, account: str, window: str) -> int:
        return self.seeds.get((account, window), 0) + sum(
            one.pico_usd
            for one in self.reservations.values()
            if account in one.accounts and _date(one.made_at_s).startswith(window)
        )

    def open(self, account: str) -> int:
        return sum(one.open and account in one.accounts for one in self.reservations.values())

    def has_room(self, accounts: tuple[str, ...], tokens: int, pico: int) -> bool:
        for name in accounts:
            limits = self.limits[name]
            for level, amount in ((self.requests[name], 1), (self.tokens[name], tokens)):
                if level is not None and not level.fits(amount):
                    return False
            most = limits.concurrent_requests
            if most is not None and self.open(name) >= most:
                return False
            for usd, window in (
                (limits.usd_per_day, self.today),
                (limits.usd_per_month, self.today[:7]),
            ):
                if usd is not None and self.committed(name, window) + pico > round(usd * 10**12):
                    return False
        return True

    def reserve(self, one_id: str, accounts: tuple[str, ...], tokens: int, pico: int) -> None:
        for name in accounts:
            for level, amount in ((self.requests[name], 1), (self.tokens[name], tokens)):
                if level is not None:
                    level.take(amount)
        levels = tuple(self.tokens[name] for name in accounts)
        self.reservations[one_id] = Reservation(accounts, tokens, pico, self.now_s, levels)

    def settle(self, one_id: str, tokens: int, pico: int) -> bool:
        one = self.reservations[one_id]
        if not one.open:
            return False
        for level in one.levels:
            if level is not None and tokens <= one.tokens:
                level.put(one.tokens - tokens)
            elif level is not None:
                level.take(tokens - one.tokens)
        self.reservations[one_id] = replace(one, pico_usd=min(pico, one.pico_usd), open=False)
        return True

    def expire(self, age_s: int) -> int:
        old = [
            one
            for one in self.reservations.values()
            if one.open and one.made_at_s <= self.now_s - age_s
        ]
        for one in old:
            one.open = False
        return len(old)


def _resize(levels: dict[str, Level | None], name: str, capacity: int | None) -> None:
    level = levels.get(name)
    if capacity is None:
        levels[name] = None
    elif level is None:
        levels[name] = Level(capacity, Fraction(capacity))
    else:
        level.resize(capacity)


def _date(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).date().isoformat()
