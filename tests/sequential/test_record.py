"""Metrics of forgetting against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.sequential import record as transfer

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


def test_by_the_papers_sums() -> None:
    """Those of Lopez-Paz and Ranzato (2017) and of Chaudhry et al. (2018), counted from 1."""
    generator = torch.Generator().manual_seed(3)
    for rounds in range(2, 7):
        scores = torch.rand(rounds, rounds, generator=generator)
        untrained = torch.rand(rounds, generator=generator)

        def a(i: int, j: int, scores: torch.Tensor = scores) -> float:
            return scores[i - 1, j - 1].item()

        b = [float("nan"), *untrained.tolist()]
        last, earlier = rounds, range(1, rounds)
        average = sum(a(last, j) for j in range(1, last + 1)) / last
        backward = sum(a(last, j) - a(j, j) for j in earlier) / (last - 1)
        forward = sum(a(j - 1, j) - b[j] for j in range(2, last + 1)) / (last - 1)
        forgotten = sum(max(a(i, j) for i in range(1, last)) - a(last, j) for j in earlier) / (
            last - 1
        )
        assert transfer.average_accuracy(scores) == pytest.approx(average)
        assert transfer.backward_transfer(scores) == pytest.approx(backward, abs=1e-6)
        assert transfer.forward_transfer(scores, untrained) == pytest.approx(forward, abs=1e-6)
        assert transfer.forgetting(scores) == pytest.approx(forgotten, abs=1e-6)
