"""What a stream did, round by round: a table on disk, the matrix of scores, metrics of transfer."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor

from ..base.files import strict_json, write
from ..data.table import safe
from ..errors import DataError
from ..posterior.posterior import Posterior

TEST, TEST_NLL, UNTRAINED = "test/", "test_nll/", "untrained/"


@dataclass(frozen=True)
class Record:
    """One row per round.

    Attributes:
        rows: round, batch, id, examples, steps, seconds, `separation` (see `FitReport`), and the
            metrics of predicting the batch before it was learnt (those of `metrics.evaluate`, and
            `drift/...`). The first round has none of the last two, as there was no posterior yet.
            With tests also `test/NAME`, the score on each after the round, `test_nll/NAME`, and in
            the first row `untrained/NAME`, the score under the prior.
    """

    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, posterior: Posterior) -> Record:
        """Read the reports in a posterior's lineage."""
        rows = []
        for number, report in enumerate(posterior.lineage, 1):
            row = {"round": number, "batch": report.name, "id": report.id}
            row |= {name: getattr(report, name) for name in ("examples", "steps", "seconds")}
            if report.separation is not None:
                row["separation"] = report.separation
            rows.append(row | report.metrics | row)  # whatever names metrics of your own have
        return cls(rows)

    @property
    def table(self) -> pandas.DataFrame:
        """The rows as a data frame."""
        return pandas.DataFrame(self.rows)

    def column(self, name: str) -> Tensor:
        """(R,) one entry of every round, nan where there is none."""
        return torch.tensor([row.get(name, nan) for row in self.rows], dtype=torch.float64)

    @property
    def tests(self) -> list[str]:
        """The names of the tests, in the order of the batches if these have the same names."""
        found = dict.fromkeys(name for row in self.rows for name in row if name.startswith(TEST))
        names = [name.removeprefix(TEST) for name in found]
        batches = [row.get("batch", "") for row in self.rows]
        return batches if sorted(batches) == sorted(names) else names

    @property
    def matrix(self) -> Tensor:
        """(R, tests) the score on test j after round i."""
        if not self.tests:
            raise DataError("the stream was run without tests")
        return torch.stack([self.column(TEST + name) for name in self.tests], 1)

    def transfer(self) -> dict[str, float]:
        """Average accuracy, backward and forward transfer, and forgetting; see `transfer`.

        Raises:
            DataError: there is not one test for each round, or one has labels that came later.
        """
        untrained = [self.rows[0].get(UNTRAINED + name, nan) for name in self.tests]
        return transfer(self.matrix, torch.tensor(untrained))

    def save(self, folder: str | Path) -> None:
        """Write `record.json` and `record.csv`, each atomically; one process at a time may."""
        folder, table = Path(folder), self.table.map(safe).to_csv(index=False)
        for name, text in (("record.json", strict_json(self.rows)), ("record.csv", table)):
            write(folder / name, text.encode())


def transfer(scores: Tensor, untrained: Tensor) -> dict[str, float]:
    """What rounds do to each other, from the matrix R of scores.

    R[i, j] is the accuracy (or another score; larger is better) on the test data of round j after
    round i has been learnt. With T rounds, counted from 1:

    * `average_accuracy`: 1/T sum_j R[T, j], over all rounds at the end (Lopez-Paz and Ranzato
      2017);
    * `backward_transfer`: 1/(T-1) sum_{j<T} R[T, j] - R[j, j], what later rounds did to earlier
      ones; negative if they were forgotten (the same);
    * `forward_transfer`: 1/(T-1) sum_{j>1} R[j-1, j] - b[j], what earlier rounds did for a round
      before it was learnt (the same);
    * `forgetting`: 1/(T-1) sum_{j<T} max_{i<T} R[i, j] - R[T, j], how far each earlier round ends
      below the best it ever was (Chaudhry et al. 2018).

    Args:
        scores: (T, T) R, with T of at least 2.
        untrained: (T,) b, the scores before any round was learnt.

    Raises:
        DataError: other shapes, or scores that are missing.

    >>> scores = transfer(torch.tensor([[0.9, 0.6], [0.7, 0.8]]), torch.tensor([0.5, 0.5]))
    >>> print(*(f"{name} {value:.2f}" for name, value in scores.items()), sep=", ")
    average_accuracy 0.75, backward_transfer -0.20, forward_transfer 0.10, forgetting 0.20
    """
    scores, untrained = (torch.as_tensor(x, dtype=torch.float64) for x in (scores, untrained))
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise DataError(f"scores must be a (T, T) matrix, got {tuple(scores.shape)}")
    if gaps := int(scores.isnan().sum()):
        raise DataError(f"scores: {gaps} of {scores.numel()} are missing; expected all of them")
    if len(scores) < 2:
        raise DataError(f"scores of {len(scores)} round; expected 2 or more")
    if untrained.shape != scores.shape[:1]:
        raise DataError(
            f"untrained has shape {tuple(untrained.shape)}, expected {tuple(scores.shape[:1])}"
        )
    last, learnt = scores[-1], scores.diagonal()
    return {
        "average_accuracy": last.mean().item(),
        "backward_transfer": (last - learnt)[:-1].mean().item(),
        "forward_transfer": (scores.diagonal(1) - untrained[1:]).mean().item(),
        "forgetting": (scores[:-1].amax(0) - last)[:-1].mean().item(),
    }
