"""Rows with what was predicted for them: kept in a file until all are, and can be written."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
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

    def count(self, forecast: AnyForecast) -> None:
        """Of a part of the rows, how it was predicted, the passes that it took, and how many are
        answered."""
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
