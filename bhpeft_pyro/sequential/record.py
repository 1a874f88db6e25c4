"""What a stream did, round by round: a table on disk, the matrix of scores, metrics of transfer."""

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
from ..files import write
from ..posterior import Posterior
from . import transfer

__all__ = ["Record"]

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
