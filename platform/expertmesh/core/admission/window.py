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
    _, _, day_of_month = _civil(day)
    first = day - day_of_month + 1
    # 31 days after the first of a month it is the 1st to 4th of the next one.
    _, _, next_day_of_month = _civil(first + 31)
    return first, first + 31 - next_day_of_month + 1


def _civil(day: int) -> tuple[int, int, int]:
    """Year, month and day of the month in the proleptic Gregorian calendar.

    Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    """
    shifted = day + 719_468
    era, day_of_era = divmod(shifted, 146_097)
    year_of_era = (
        day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096
    ) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted_month = (5 * day_of_year + 2) // 153
    day_of_month = day_of_year - (153 * shifted_month + 2) // 5 + 1
    month = shifted_month + 3 if shifted_month < 10 else shifted_month - 9
    return year_of_era + era * 400 + (month <= 2), month, day_of_month
