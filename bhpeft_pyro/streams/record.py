"""What a stream did, round by round: a table in memory and on disk."""

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
from ..posterior.posterior import Posterior

TEST, TEST_NLL = "test/", "test_nll/"


@dataclass(frozen=True)
class Record:
    """One row per round.

    Attributes:
        rows: round, batch, id, examples, steps, seconds, `separation` (see `FitReport`), and the
            metrics of predicting the batch before it was learnt (those of `metrics.evaluate`, and
            `drift/...`). The first round has none of the last two, as there was no posterior yet.
            With tests also `test/NAME`, the score on each after the round (accuracy, or minus the
            MSE of ratings), and `test_nll/NAME`.
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

    def save(self, folder: str | Path) -> None:
        """Write `record.json` and `record.csv`, each atomically; one process at a time may."""
        folder, table = Path(folder), self.table.map(safe).to_csv(index=False)
        for name, text in (("record.json", strict_json(self.rows)), ("record.csv", table)):
            write(folder / name, text.encode())
