"""The book against a naive model, under any order of calls."""

from datetime import UTC, datetime
from fractions import Fraction

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)
from tests.core.admission.limit_model import Model

from expertmesh.core.admission.limit_book import (
    Estimate,
    LimitBook,
    LimitKind,
    Refused,
    Reserved,
    pico_of_usd,
)
from expertmesh.core.domain.tenant import Account, Limits

START_S = int(datetime(2026, 1, 30, 22, tzinfo=UTC).timestamp())
RESERVATION_S = 3_600
NAMES = ("tenant:a", "tenant:b", "key:1")
# Multiples of 60, so that a refill by whole seconds is exact.
RATES = st.none() | st.sampled_from([0, 60, 120, 600])
MONEY = st.none() | st.sampled_from([0.0, 0.3, 1.0, 2.5])
LIMITS = st.builds(
    Limits,
    requests_per_min=RATES,
    tokens_per_min=RATES,
    concurrent_requests=st.none() | st.integers(0, 5),
    usd_per_day=MONEY,
    usd_per_month=MONEY,
)
TOKENS = st.integers(0, 1_500)
PICO = st.integers(0, 5) | st.integers(0, 10**12)


class BookMachine(RuleBasedStateMachine):
    ids: Bundle[str] = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.book = LimitBook(RESERVATION_S)
        self.model = Model(START_S)
        self.accounts = {name: Account(name, Limits()) for name in NAMES}
        self.count = 0
        self.clipped = 0

    @property
    def now_s(self) -> float:
        return float(self.model.now_s)

    @rule(name=st.sampled_from(NAMES), limits=LIMITS)
    def change_limits(self, name: str, limits: Limits) -> None:
        self.accounts[name] = Account(name, limits)

    @rule(elapsed_s=st.integers(1, 90) | st.sampled_from([3_600, 40_000, 86_400, 40 * 86_400]))
    def wait(self, elapsed_s: int) -> None:
        self.model.advance(elapsed_s)

    @rule(
        target=ids,
        names=st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
        tokens=TOKENS,
        pico=PICO,
        times=st.integers(1, 5),
    )
    def reserve(self, names: list[str], tokens: int, pico: int, times: int) -> object:
        made = []
        accounts = tuple(self.accounts[name] for name in names)
        for account in accounts:
            self.model.apply(account)
        for _ in range(times):
            self.count += 1
            one_id = f"r{self.count}"
            expected = self.model.has_room(tuple(names), tokens, pico)
            answer = self.book.reserve(one_id, accounts, Estimate(tokens, pico), self.now_s)
            if isinstance(answer, Refused):
                assert not expected, answer
                assert answer.account in names and answer.retry_after_s > 0
                assert answer.kind is not LimitKind.UNAVAILABLE
                assert not self.book.settle(one_id, 0, 0, self.now_s)
                continue
            assert isinstance(answer, Reserved) and expected
            self.model.reserve(one_id, tuple(names), tokens, pico)
            self.check_headroom(answer, names)
            self.check_budgets(accounts)
            made.append(one_id)
        return multiple(*made)

    def check_headroom(self, answer: Reserved, names: list[str]) -> None:
        requests = [level for name in names if (level := self.model.requests[name])]
        tokens = [level for name in names if (level := self.model.tokens[name])]
        if not requests and not tokens:
            assert answer.headroom is None
            return
        assert answer.headroom is not None
        for levels, left, reset_s in (
            (requests, answer.headroom.remaining_requests, answer.headroom.reset_requests_s),
            (tokens, answer.headroom.remaining_tokens, answer.headroom.reset_tokens_s),
        ):
            if not levels:
                assert left is None and reset_s is None
                continue
            assert left == min(int(level.left) for level in levels)
            assert reset_s is not None and reset_s >= 0

    def check_budgets(self, accounts: tuple[Account, ...]) -> None:
        for account in accounts:
            committed = self.book.committed_pico_usd(account.name)
            budgets = account.limits.usd_per_day, account.limits.usd_per_month
            for spent, usd in zip(committed, budgets, strict=True):
                assert usd is None or spent <= pico_of_usd(usd)

    @rule(one_id=consumes(ids), tokens=TOKENS, pico=PICO)
    def settle(self, one_id: str, tokens: int, pico: int) -> None:
        reservation = self.model.reservations[one_id]
        if reservation.open:
            self.clipped += max(0, pico - reservation.pico_usd)
        expected = self.model.settle(one_id, tokens, pico)
        assert self.book.settle(one_id, tokens, pico, self.now_s) is expected
        assert self.book.settle(one_id, tokens, pico, self.now_s) is False

    @rule(one_id=consumes(ids))
    def forfeit(self, one_id: str) -> None:
        expected = self.model.reservations[one_id].open
        self.model.reservations[one_id].open = False
        assert self.book.forfeit(one_id) is expected

    @rule()
    def expire(self) -> None:
        assert self.book.expire(self.now_s) == self.model.expire(RESERVATION_S)

    @rule(name=st.sampled_from(NAMES), day_pico=PICO, month_pico=PICO)
    def seed(self, name: str, day_pico: int, month_pico: int) -> None:
        self.model.seed(name, day_pico, month_pico)
        self.book.seed(name, day_pico, month_pico, self.now_s)

    @invariant()
    def agrees(self) -> None:
        self.book.seed("nobody", 0, 0, self.now_s)  # The book learns what time it is.
        assert self.book.open_reservations == sum(
            one.open for one in self.model.reservations.values()
        )
        assert self.book.clipped_pico_usd == self.clipped
        for name in NAMES:
            today = self.model.today
            assert self.book.committed_pico_usd(name) == (
                self.model.committed(name, today),
                self.model.committed(name, today[:7]),
            )
            record = self.book._records.get(name)
            if record is None:
                continue
            assert record.open == self.model.open(name)
            if record.limits != self.model.limits.get(name, Limits()):
                continue  # Forgotten after a month, and not used again yet.
            for bucket, level in (
                (record.requests, self.model.requests.get(name)),
                (record.tokens, self.model.tokens.get(name)),
            ):
                assert (bucket is None) == (level is None)
                if bucket is not None and level is not None:
                    assert bucket.used >= 0
                    used = Fraction(bucket.refill(self.now_s))
                    assert used == level.capacity - level.left + level.owed


BookMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLimitBook = BookMachine.TestCase
