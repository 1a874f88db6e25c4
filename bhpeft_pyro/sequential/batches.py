"""Tables cut into the batches of a stream, in order of time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args

from datasets import Dataset

from ..errors import ConfigError, DataError
from ..names import Period

__all__ = ["by_count", "by_period"]

_NAMES: dict[Period, Callable[[datetime], str]] = {
    "day": lambda day: f"{day:%Y-%m-%d}",
    "week": lambda day: f"{day - timedelta(day.weekday()):%Y-%m-%d}",  # its Monday
    "month": lambda day: f"{day:%Y-%m}",
    "quarter": lambda day: f"{day:%Y}-Q{(day.month + 2) // 3}",
    "year": lambda day: f"{day:%Y}",
}


def by_period(table: Dataset, column: str, every: Period = "week") -> dict[str, Dataset]:
    """One batch for each day, week, month, quarter or year that has rows.

    Args:
        table: rows in any order; within a batch they are in order of time.
        column: of ISO 8601 dates or times, or of timestamps; those with a zone are taken to UTC.
        every: the length of a batch. A week is named by its Monday.

    Raises:
        ConfigError: another period.
        DataError: no such column, or a value that is no date.

    >>> days = ["2024-03-04", "2024-02-28T09:30:00", "2024-03-10"]
    >>> table = Dataset.from_dict({"date": days, "text": ["b", "a", "c"]})
    >>> {name: batch["text"][:] for name, batch in by_period(table, "date").items()}
    {'2024-02-26': ['a'], '2024-03-04': ['b', 'c']}
    >>> list(by_period(table, "date", "month"))
    ['2024-02', '2024-03']
    """
    if every not in get_args(Period):
        raise ConfigError(f"every={every!r} is not one of {', '.join(get_args(Period))}")
    times = _times(table, column)
    rows: dict[str, list[int]] = {}
    for row in sorted(range(len(times)), key=times.__getitem__):
        rows.setdefault(_NAMES[every](times[row]), []).append(row)
    return {name: table.select(chosen) for name, chosen in rows.items()}


def by_count(table: Dataset, count: int, column: str | None = None) -> dict[str, Dataset]:
    """Batches of `count` rows; the last may be smaller.

    Args:
        table: the rows, in order of time if `column` is None.
        count: rows a batch.
        column: order by these dates, as for `by_period`.

    Raises:
        ConfigError: a count below 1.
        DataError: as for `by_period`.

    >>> list(by_count(Dataset.from_dict({"text": ["a", "b", "c"]}), 2))
    ['rows 1-2', 'rows 3-3']
    """
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1")
    if column is not None:
        times = _times(table, column)
        table = table.select(sorted(range(len(times)), key=times.__getitem__))
    ends = [min(start + count, len(table)) for start in range(0, len(table), count)]
    starts = [0, *ends[:-1]]
    return {
        f"rows {start + 1}-{end}": table.select(range(start, end))
        for start, end in zip(starts, ends, strict=True)
    }


def _times(table: Dataset, column: str) -> list[datetime]:
    if column not in table.column_names:
        raise DataError(
            f"there is no date column {column!r}; columns there: {', '.join(table.column_names)}"
        )
    return [_time(value, column, row) for row, value in enumerate(table[column][:])]


def _time(value: Any, column: str, row: int) -> datetime:
    try:
        if isinstance(value, date) and not isinstance(value, datetime):
            value = value.isoformat()
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {column!r}, row {row}: {value!r:.40} is no date; expected ISO 8601, "
            "such as 2024-03-31 or 2024-03-31T12:00"
        ) from error
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
