"""`POST /predict`, in the shape of Hugging Face's Text Embeddings Inference.

A text is answered by a list of labels with their scores, the most probable first; a list of texts
by a list of such lists. `{"details": true}` asks for all that the round says of a text.

It differs from Text Embeddings Inference in one point: `["first", "second"]` is two texts here, as
any list of strings is a list of texts; there it is a text and its pair. A list of pairs is
`[["first", "second"]]` in both.
"""

from __future__ import annotations

from typing import Any

from ..base.checks import shown
from .answers import Answer
from .engine import Answered, Refused
from .loading import Served
from .questions import Question, column_of, table_of

__all__ = ["read"]


def read(payload: Any, served: Served) -> Question:
    """The question of a request's JSON.

    Raises:
        Refused: it cannot be read, or the round does not read texts alone.
    """
    if not isinstance(payload, dict) or "inputs" not in payload:
        raise Refused(422, f"got {shown(payload)}; expected an object with 'inputs'")
    if served.kind == "choice" or served.each_word or served.numbers:
        raise Refused(422, "this round does not read texts alone; POST a table to /invocations")
    inputs, texts = payload["inputs"], served.texts
    details = column_of(payload, "details", bool, False)
    cut = column_of(payload, "truncate", bool, True)
    if column_of(payload, "raw_scores", bool, False):
        raise Refused(422, "raw_scores: a mixture of networks has none; expected false")
    rows = inputs if isinstance(inputs, list) else [inputs]
    rows = [row if isinstance(row, list) else [row] for row in rows]
    for row in rows:
        if len(row) != len(texts):
            expected = "a text" if len(texts) == 1 else "a pair of texts, [[first, second], ...]"
            raise Refused(422, f"inputs: got {shown(row)}; expected {expected}")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(texts)}

    def write(answered: Answered) -> Any:
        name, round = served.posterior.columns.label, answered.served.id
        answers = [row.in_full(round) if details else _scored(row, name) for row in answered.rows]
        return answers if isinstance(inputs, list) else answers[0]

    return Question(table_of(columns, served), write, whole=not cut)


def _scored(answer: Answer, name: str) -> list[dict[str, Any]]:
    """Labels and scores; of a rating its mean, under the name of its column."""
    scores = answer.scores or {name: answer.said["prediction"]}
    return [{"label": label, "score": score} for label, score in scores.items()]
