"""Tables cut into batches, by dates and by counts."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from datasets import Dataset

from bhpeft_pyro.errors import BHPEFTWarning, ConfigError, DataError
from bhpeft_pyro.streams import by_count, by_period


def test_periods() -> None:
    days = ["2024-12-30", "2025-01-01T08:00:00", "2024-12-29", "2025-01-02T01:00:00+05:00"]
    table = Dataset.from_dict({"day": days, "text": list("abcd")})
    found = {
        every: {
            name: "".join(batch["text"][:])
            for name, batch in by_period(table, "day", every).items()
        }  # type: ignore[arg-type]
        for every in ("day", "week", "month", "quarter", "year")
    }
    assert found == {
        "day": {"2024-12-29": "c", "2024-12-30": "a", "2025-01-01": "bd"},
        "week": {"2024-12-23": "c", "2024-12-30": "abd"},
        "month": {"2024-12": "ca", "2025-01": "bd"},
        "quarter": {"2024-Q4": "ca", "2025-Q1": "bd"},
        "year": {"2024": "ca", "2025": "bd"},
    }
    parsed = Dataset.from_dict({"day": [date(2024, 3, 2), date(2024, 3, 1)], "text": ["b", "a"]})
    assert list(by_period(parsed, "day", "day")) == ["2024-03-01", "2024-03-02"]
    assert [batch["text"][:] for batch in by_count(parsed, 1, "day").values()] == [["a"], ["b"]]
    with pytest.raises(ConfigError, match="every='hour'"):
        by_period(table, "day", "hour")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="count=0"):
        by_count(table, 0)
    with pytest.raises(DataError, match="row 1: None is not a date"):
        by_period(Dataset.from_dict({"day": ["2024-01-01", None]}), "day")
    for word in ("now", "today"):  # to pandas a date, and another one in every run
        with pytest.raises(DataError, match=f"row 0: '{word}' is not a date"):
            by_period(Dataset.from_dict({"day": [word]}), "day")
    empty = Dataset.from_dict({"day": []})
    assert by_period(empty, "day") == by_count(empty, 3, "day") == {}


def test_batches_that_were_learnt_stay_when_the_table_grows() -> None:
    table = Dataset.from_dict({"text": list("abcdefghijkl")})

    def ends(*learnt: str) -> list[int]:
        batches = by_count(table, 5, learnt=learnt)
        assert "".join("".join(rows["text"][:]) for rows in batches.values()) == "abcdefghijkl"
        return [int(name.partition("-")[2]) for name in batches]

    assert ends() == [5, 10, 12]
    assert ends("rows 1-5", "rows 6-7") == [5, 7, 12]
    assert ends("rows 1-5", "rows 6-10", "rows 11-12") == [5, 10, 12]
    assert ends("rows 1-2", "rows 3-4", "rows 5-5") == [2, 4, 5, 10, 12]
    # Of another table, such as a longer one, or of weeks: a stream then says what differs.
    assert ends("rows 1-5", "rows 6-13") == ends("2024-01-01") == ends("rows 2-4") == [5, 10, 12]


def test_a_period_that_is_not_over() -> None:
    today = datetime.now(UTC)
    before = Dataset.from_dict({"day": [f"{today - timedelta(days=8):%Y-%m-%d}"]})
    by_period(before, "day", "week")  # is over on every day of the week
    with pytest.warns(BHPEFTWarning, match=r"day: the last week ends on \d+-\d+-\d+ and is not"):
        by_period(Dataset.from_dict({"day": [f"{today:%Y-%m-%d}"]}), "day", "week")
    with pytest.warns(BHPEFTWarning, match="ends on 10000-01-02 and is not over"):
        last = by_period(Dataset.from_dict({"day": ["9999-12-31"]}), "day")  # "for ever"
    assert list(last) == ["9999-12-27"]
