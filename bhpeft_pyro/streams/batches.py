"""Tables cut into the batches of a stream, in order of time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import pandas as pd

from ..base.checks import warn
from ..base.names import Period
from ..base.values import Count, checked_call, valid
from ..data.columns import wrong
from ..data.table import need, numbered, table

_FORMATS: dict[Period, tuple[str, str]] = {  # pandas' frequency, and the name of a batch
    "day": ("D", "%Y-%m-%d"),
    "week": ("W-SUN", "%Y-%m-%d"),  # its Monday
    "month": ("M", "%Y-%m"),
    "quarter": ("Q", "%Y-Q%q"),
    "year": ("Y", "%Y"),
}

_ROWS = re.compile(r"rows (\d+)-(\d+)")  # the name of a batch of so many


def by_period(data: object, column: str, every: Period = "week") -> dict[str, pd.DataFrame]:
    """One batch for each day, week, month, quarter or year that has rows. Warns if the last one is
    not over yet: a stream that has learnt it cannot add the rows that are still to come.

    Args:
        data: what `bh.data.table` takes, in any order; within a batch rows are in order of time.
        column: of ISO 8601 dates or times, or of timestamps; those with a zone are taken to UTC.
        every: the length of a batch. A week is named by its Monday.

    Raises:
        ConfigError: another period.
        DataError: no such column, or a value that is not a date.

    >>> days = ["2024-03-04", "2024-02-28T09:30:00", "2024-03-10"]
    >>> data = {"date": days, "text": ["b", "a", "c"]}
    >>> {name: batch["text"].tolist() for name, batch in by_period(data, "date").items()}
    {'2024-02-26': ['a'], '2024-03-04': ['b', 'c']}
    >>> list(by_period(data, "date", "month"))
    ['2024-02', '2024-03']
    """
    valid(Period, "every", every)
    rows = table(data)
    times = _times(rows, column)
    frequency, name = _FORMATS[every]
    starts = times.dt.to_period(frequency)
    if (last := starts.max()).end_time > pd.Timestamp.now("UTC").tz_localize(None):
        warn(
            f"{column}: the last {every} ends on {last.asfreq('D')} and is not over; once learnt, "
            "it takes no more rows. Leave out its rows until then"
        )
    names = starts.dt.asfreq("D", how="start").dt.strftime(name)
    groups = names.groupby(names).groups
    return {str(batch): rows.loc[numbers] for batch, numbers in groups.items()}


@checked_call
def by_count(
    data: object, count: Count, column: str | None = None, learnt: Iterable[str] = ()
) -> dict[str, pd.DataFrame]:
    """Batches of `count` rows; the last may be smaller.

    Args:
        data: what `bh.data.table` takes; in order of time if `column` is None.
        count: rows in a batch.
        column: order by these dates, as for `by_period`.
        learnt: the names of the batches of a stream so far, which stay as they are: rows that have
            come since are in new ones, also where the last batch was smaller.

    Raises:
        ConfigError: a count below 1.
        DataError: as for `by_period`.

    >>> list(by_count({"text": ["a", "b", "c"]}, 2))
    ['rows 1-2', 'rows 3-3']
    >>> grown = {"text": ["a", "b", "c", "d", "e"]}
    >>> list(by_count(grown, 2, learnt=["rows 1-2", "rows 3-3"]))
    ['rows 1-2', 'rows 3-3', 'rows 4-5']
    """
    rows = table(data)
    if column is not None:
        rows = rows.loc[_times(rows, column).index]
    size, starts = len(rows), [0]
    for name in learnt:
        learnt_rows = _ROWS.fullmatch(name)
        if learnt_rows and int(learnt_rows[1]) == starts[-1] + 1 and int(learnt_rows[2]) < size:
            starts.append(int(learnt_rows[2]))
    starts += range(starts.pop(), size, count)
    parts = pairwise([*starts, size])
    return {f"rows {start + 1}-{end}": rows.iloc[start:end] for start, end in parts}


def _times(rows: pd.DataFrame, column: str) -> pd.Series:
    """UTC times in order, with the rows' numbers as their index."""
    values = need(rows, column)[column]
    texts = values.map(str)
    texts = texts.where(texts.str[:1].str.isdigit())  # to pandas "now" and "today" are dates too
    times = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
    if times.isna().any():
        bad = times.isna().to_numpy().nonzero()[0].tolist()
        what = f"{values.iloc[bad[0]]!r:.40} is not a date; expected ISO 8601, such as 2024-03-31"
        with numbered(rows):
            raise wrong(column, bad, f"{what} or 2024-03-31T12:00")
    return times.dt.tz_localize(None).sort_values(kind="stable")
