"""Metrics of forgetting against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.sequential import transfer

# Rows: after rounds 1, 2, 3. Columns: tests 1, 2, 3.
SCORES = torch.tensor([[0.90, 0.30, 0.40], [0.95, 0.80, 0.60], [0.70, 0.60, 1.00]])
UNTRAINED = torch.tensor([0.25, 0.20, 0.35])


def test_by_hand() -> None:
    assert transfer.average_accuracy(SCORES) == pytest.approx((0.70 + 0.60 + 1.00) / 3)
    # From the round itself: test 1 from 0.90 to 0.70, test 2 from 0.80 to 0.60.
    assert transfer.backward_transfer(SCORES) == pytest.approx((-0.20 - 0.20) / 2)
    # Just before the round: test 2 at 0.30 (0.20 untrained), test 3 at 0.60 (0.35).
    assert transfer.forward_transfer(SCORES, UNTRAINED) == pytest.approx((0.10 + 0.25) / 2)
    # From the best before the last round: test 1 from 0.95, which was after round 2.
    assert transfer.forgetting(SCORES) == pytest.approx((0.25 + 0.20) / 2)


def test_bad_matrices() -> None:
    for bad in (SCORES[:2], SCORES[0], SCORES * float("nan")):
        with pytest.raises(DataError, match=r"\(T, T\) matrix"):
            transfer.average_accuracy(bad)
    with pytest.raises(DataError, match="expected 2 or more"):
        transfer.forgetting(SCORES[:1, :1])
    with pytest.raises(DataError, match=r"shape \(2,\), expected \(3,\)"):
        transfer.forward_transfer(SCORES, UNTRAINED[:2])
