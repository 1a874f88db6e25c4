"""Metrics of transfer against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.streams import Record, transfer
from bhpeft_pyro.testing import tiny_examples, tiny_model

# Rows: after rounds 1, 2, 3. Columns: tests 1, 2, 3.
SCORES = torch.tensor([[0.90, 0.30, 0.40], [0.95, 0.80, 0.60], [0.70, 0.60, 1.00]])
UNTRAINED = torch.tensor([0.25, 0.20, 0.35])


def test_by_hand() -> None:
    assert transfer(SCORES, UNTRAINED) == pytest.approx(
        {
            "average_accuracy": (0.70 + 0.60 + 1.00) / 3,
            # From the round itself: test 1 from 0.90 to 0.70, test 2 from 0.80 to 0.60.
            "backward_transfer": (-0.20 - 0.20) / 2,
            # Just before the round: test 2 at 0.30 (0.20 untrained), test 3 at 0.60 (0.35).
            "forward_transfer": (0.10 + 0.25) / 2,
            # From the best before the last round: test 1 from 0.95, which was after round 2.
            "forgetting": (0.25 + 0.20) / 2,
        }
    )


def test_bad_matrices() -> None:
    assert transfer(SCORES.tolist(), UNTRAINED.tolist()) == transfer(SCORES, UNTRAINED)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="9 of 9 are missing"):
        transfer(SCORES * float("nan"), UNTRAINED)
    for bad in (SCORES[:2], SCORES[0]):
        with pytest.raises(DataError, match=r"\(T, T\) matrix"):
            transfer(bad, UNTRAINED)
    with pytest.raises(DataError, match="expected 2 or more"):
        transfer(SCORES[:1, :1], UNTRAINED[:1])
    with pytest.raises(DataError, match=r"shape \(2,\), expected \(3,\)"):
        transfer(SCORES, UNTRAINED[:2])


def test_a_record_is_a_table() -> None:
    rows = [{"batch": "a", "test/a": 0.5}, {"batch": "b", "nll": 0.4, "test/a": 0.6}]
    record = Record(rows)
    assert record.tests == ["a"] and record.matrix.tolist() == [[0.5], [0.6]]
    assert record.table["nll"].isna().tolist() == [True, False]
    with pytest.raises(DataError, match="without tests"):
        _ = Record([{"batch": "a"}]).matrix


def test_metrics_of_ones_own_leave_the_columns_of_a_record_as_they_are() -> None:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=1, progress=False)
    given = {"examples": 0.5, "batch": 1.0, "own": 2.0}
    record = Record.of(posterior.with_report(name="monday", metrics=given))
    (row,) = record.rows
    assert (row["examples"], row["batch"], row["own"]) == (12, "monday", 2.0)


def test_tests_with_the_names_of_batches_come_in_their_order() -> None:
    rows = [
        {"batch": str(i), **{f"test/{j}": SCORES[i, j].item() for j in (2, 0, 1)}} for i in range(3)
    ]
    record = Record(rows)
    assert record.tests == ["0", "1", "2"]
    assert record.transfer()["backward_transfer"] == pytest.approx(-0.2)
    others = Record([{"batch": "a", "test/y": 0.5, "test/x": 0.5}, {"batch": "b"}])
    assert others.tests == ["y", "x"]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """Strict readers of JSON refuse `Infinity`."""
    Record([{"batch": "a", "drift/nll_z": float("inf"), "nll": 0.5}]).save(tmp_path)
    (row,) = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert row == {"batch": "a", "drift/nll_z": None, "nll": 0.5}
