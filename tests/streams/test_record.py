"""A stream's record is a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.streams import Record
from bhpeft_pyro.testing import tiny_examples, tiny_model


def test_a_record_is_a_table() -> None:
    rows = [{"batch": "a", "test/a": 0.5}, {"batch": "b", "nll": 0.4, "test/a": 0.6}]
    record = Record(rows)
    assert record.column("test/a").tolist() == [0.5, 0.6]
    assert record.table["nll"].isna().tolist() == [True, False]


def test_metrics_of_ones_own_leave_the_columns_of_a_record_as_they_are() -> None:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=1, progress=False)
    given = {"examples": 0.5, "batch": 1.0, "own": 2.0}
    record = Record.of(posterior.with_report(name="monday", metrics=given))
    (row,) = record.rows
    assert (row["examples"], row["batch"], row["own"]) == (12, "monday", 2.0)


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """Strict readers of JSON refuse `Infinity`."""
    Record([{"batch": "a", "drift/nll_z": float("inf"), "nll": 0.5}]).save(tmp_path)
    (row,) = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert row == {"batch": "a", "drift/nll_z": None, "nll": 0.5}
