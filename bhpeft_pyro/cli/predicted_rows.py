"""Rows with what was predicted for them: kept in a file until all are, then written."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ..prediction.predict import AnyForecast


class Kept:
    """All rows with what was predicted for them, in a file: which examples are flagged is known
    only when all are predicted."""

    def __init__(self, file: TextIO, words: bool) -> None:
        self.file, self.words = file, words
        self.columns: dict[str, None] = {}  # that are predicted
        self.scores = array("d")  # how uncertain each example is
        self.method, self.passes, self.examples = "", 0.0, 0
        self.answered: int | None = None  # under a promise

    def count(self, forecast: AnyForecast | None) -> None:
        """Of a part of the rows, how it was predicted, the passes that it took, and how many are
        answered."""
        if forecast is not None:
            self.method = forecast.method
            self.passes += len(forecast) * (forecast.passes or 0.0)
            self.examples += len(forecast)
            if forecast.answered is not None:
                self.answered = (self.answered or 0) + int(forecast.answered.sum())

    def add(
        self, row: dict[str, Any], predicted: dict[str, Any], scores: list[float], texts: list[str]
    ) -> None:
        """One row, the columns that are predicted for it, and of each of its examples how uncertain
        it is, and the text; the last three are empty if it cannot be predicted."""
        self.columns = self.columns or dict.fromkeys(predicted)
        self.file.write(json.dumps([row, predicted, texts], default=str) + "\n")
        self.scores.extend(scores)

    def records(
        self, names: dict[str, None], flagged: set[int], shown: dict[int, Any]
    ) -> Iterator[dict[str, Any]]:
        """Each row as it is written, with `names`; those of `shown` are filled in on the way."""
        self.file.seek(0)
        number = 0
        for at, line in enumerate(self.file):
            row, predicted, texts = json.loads(line)
            marks = []
            for place, text in enumerate(texts):
                if number in shown:
                    cells = {k: v[place] if self.words else v for k, v in predicted.items()}
                    shown[number] = {"row": at} | cells | {"text": " ".join(text.split())}
                marks.append(number in flagged)
                number += 1
            mark = (marks if self.words else marks[0]) if marks else None
            yield names | row | (predicted or self.columns) | {"flagged": mark}


def write_rows(out: Path, records: Iterable[dict[str, Any]], names: Iterable[str]) -> None:
    """Write a CSV file, or JSON lines."""
    from ..base.files import writing
    from ..data.cells import safe

    with writing(out) as file:
        # Half an emoji, which JSON may hold, has no UTF-8.
        text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        if out.suffix == ".csv":
            # A bare carriage return, at which readers would end a row, is quoted by the writer only
            # if it is in the writer's own ends of lines.
            lines: Any = SimpleNamespace(write=lambda line: text.write(line[:-2] + "\n"))
            writer = csv.DictWriter(lines, [*names], lineterminator="\r\n")
            writer.writerow({name: safe(name) for name in names})
            for record in records:
                nested = {k: json.dumps(v) for k, v in record.items() if isinstance(v, list | dict)}
                writer.writerow({k: safe(v) for k, v in (record | nested).items()})
        else:
            for record in records:
                text.write(json.dumps(record, ensure_ascii=False) + "\n")
        text.detach()  # which writes what is left, and leaves the file open
