"""UTC days and calendar months, and the money of one of them."""

_DAY_S = 86_400


class Window:
    """What one account may no longer spend in one day or month: spent, or reserved for it."""

    __slots__ = ("committed_pico_usd", "seeded")

    def __init__(self) -> None:
        self.committed_pico_usd = 0
        self.seeded = False
        """What was spent before this process began to count is in."""


def day_of(at_s: float) -> int:
    """Days since 1970-01-01 UTC."""
    return int(at_s // _DAY_S)


def day_start_s(day: int) -> int:
    return day * _DAY_S


def month_of(day: int) -> tuple[int, int]:
    """First day of the day's month and of the next month, in days since 1970-01-01."""
    first = day - _day_of_month(day) + 1
    # 31 days after the first of a month it is the 1st to 4th of the next one.
    return first, first + 31 - _day_of_month(first + 31) + 1


def _day_of_month(day: int) -> int:
    """From 1, in the proleptic Gregorian calendar.

    Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    """
    day_of_era = (day + 719_468) % 146_097
    year_of_era = (
        day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096
    ) // 365
    # From here on years begin in March.
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    return day_of_year - (153 * month + 2) // 5 + 1
