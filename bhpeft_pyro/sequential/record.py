"""What a stream did, round by round: a table on disk, the matrix of scores, metrics of transfer.

Metrics of what is kept, and carried over, from round to round.

All take a matrix R (T, T): R[i, j] is the accuracy (or another score, larger is better) on the
test data of round j after round i has been learnt. With T rounds, counted from 1:
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..posterior.io import write
from ..posterior.posterior import Posterior
from . import record as transfer

__all__ = [
    "Record",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
]


TEST, TEST_NLL, UNTRAINED = "test/", "test_nll/", "untrained/"


@dataclass(frozen=True)
class Record:
    """One row a round.

    Attributes:
        rows: round, batch, id, examples, steps, seconds, and the metrics of predicting the batch
            before it was learnt (those of `metrics.evaluate`, and `drift/...`); none of those in
            the first round, where there is no posterior yet. With tests also `test/NAME`, the
            score on each after the round, `test_nll/NAME`, and in the first row
            `untrained/NAME`, the score under the prior.
    """

    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, posterior: Posterior) -> Record:
        """From the reports in a posterior's lineage."""
        return cls(
            [
                {
                    "round": number,
                    "batch": report.name,
                    "id": report.id,
                    "examples": report.examples,
                    "steps": report.steps,
                    "seconds": report.seconds,
                    **report.metrics,
                }
                for number, report in enumerate(posterior.lineage, 1)
            ]
        )

    def column(self, name: str) -> Tensor:
        """(R,) one entry of every round, nan where there is none."""
        values = [row.get(name, nan) for row in self.rows]
        return torch.tensor(values, dtype=torch.float64)

    @property
    def tests(self) -> list[str]:
        """The names of the tests, in order."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(TEST))
        return [name.removeprefix(TEST) for name in names]

    @property
    def matrix(self) -> Tensor:
        """(R, tests) the score on test j after round i."""
        if not self.tests:
            raise DataError("the stream was run without tests")
        return torch.stack([self.column(TEST + name) for name in self.tests], 1)

    def transfer(self) -> dict[str, float]:
        """Average accuracy, backward and forward transfer, and forgetting (`transfer`).

        Raises:
            DataError: there is not one test for each round, or one has labels that came later.
        """
        scores = self.matrix
        untrained = torch.tensor([self.rows[0].get(UNTRAINED + name, nan) for name in self.tests])
        return {
            "average_accuracy": transfer.average_accuracy(scores),
            "backward_transfer": transfer.backward_transfer(scores),
            "forward_transfer": transfer.forward_transfer(scores, untrained),
            "forgetting": transfer.forgetting(scores),
        }

    def save(self, folder: Path) -> None:
        """Write `record.json` and `record.csv`, each at once."""
        write(folder / "record.json", json.dumps(self.rows, indent=1).encode())
        names = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(names))
        table.writeheader()
        table.writerows(self.rows)
        write(folder / "record.csv", text.getvalue().encode())


def average_accuracy(scores: Tensor) -> float:
    """1/T sum_j R[T, j] (Lopez-Paz and Ranzato 2017): over all rounds, at the end.

    >>> import torch
    >>> average_accuracy(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    0.75
    """
    return _checked(scores)[-1].mean().item()


def backward_transfer(scores: Tensor) -> float:
    """1/(T-1) sum_{j<T} R[T, j] - R[j, j] (Lopez-Paz and Ranzato 2017).

    What later rounds have done to earlier ones: below zero, they were forgotten.

    >>> import torch
    >>> round(backward_transfer(torch.tensor([[0.9, 0.5], [0.7, 0.8]])), 6)
    -0.2
    """
    scores = _checked(scores, 2)
    return (scores[-1] - scores.diagonal())[:-1].mean().item()


def forward_transfer(scores: Tensor, untrained: Tensor) -> float:
    """1/(T-1) sum_{j>1} R[j-1, j] - b[j] (Lopez-Paz and Ranzato 2017).

    What earlier rounds have done for a round before it was learnt.

    Args:
        scores: R.
        untrained: (T,) b, the scores before any round was learnt.

    >>> import torch
    >>> round(forward_transfer(torch.tensor([[0.9, 0.6], [0.7, 0.8]]), torch.tensor([0.5, 0.5])), 6)
    0.1
    """
    scores = _checked(scores, 2)
    if untrained.shape != scores.shape[:1]:
        raise DataError(
            f"untrained has shape {tuple(untrained.shape)}, expected {tuple(scores.shape[:1])}"
        )
    return (scores.diagonal(1) - untrained.double()[1:]).mean().item()


def forgetting(scores: Tensor) -> float:
    """1/(T-1) sum_{j<T} max_{i<T} R[i, j] - R[T, j] (Chaudhry et al. 2018).

    How far each earlier round is, at the end, below the best it ever was.

    >>> import torch
    >>> round(forgetting(torch.tensor([[0.9, 0.5], [0.7, 0.8]])), 6)
    0.2
    """
    scores = _checked(scores, 2)
    return (scores[:-1].amax(0) - scores[-1])[:-1].mean().item()


def _checked(scores: Tensor, rounds: int = 1) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or scores.isnan().any():
        raise DataError(f"scores must be a (T, T) matrix without gaps, got {tuple(scores.shape)}")
    if len(scores) < rounds:
        raise DataError(f"scores of {len(scores)} round; expected {rounds} or more")
    return scores.double()
