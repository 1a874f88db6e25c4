"""Small data sets of every kind."""

from __future__ import annotations

from typing import Any

from toy_tokenizers import bert_like, texts_of

from bhpeft_pyro.data import Columns, Examples, encode
from bhpeft_pyro.testing import tiny_tokenizer

TEXTS = [f"w{5 + i % 7} w{10 + i}" + " w3" * (i % 4) for i in range(10)]


def every_kind() -> dict[str, Examples]:
    """Ten rows of each kind; their fingerprints are known to the tests."""

    def encoded(labels: Any, kind: Any, columns: Columns = Columns(), **more: Any) -> Examples:
        table = {"text": TEXTS, "label": labels, **more}
        return encode(table, tiny_tokenizer(), kind=kind, columns=columns)

    choices = [["w5", "w6 w7", "w8"][: 2 + i % 2] for i in range(10)]
    asked = {"question": TEXTS, "choices": choices, "answer": [i % 2 for i in range(10)]}
    ratings, extra = [i / 7 for i in range(10)], Columns(extra=("n",))
    return {
        "class": encoded([0, 1] * 5, "class"),
        "rating": encoded(ratings, "rating", extra, n=range(10)),
        "labels": encoded([["a", "b"][: i % 3] for i in range(10)], "labels"),
        "choice": encode(asked, tiny_tokenizer(), kind="choice"),
    }


def numbered(lengths: list[int], tokenizer: Any = None) -> Examples:
    """Examples whose rating is their number, so that a batch says what is in it."""
    data = {"text": texts_of(lengths), "label": [float(i) for i in range(len(lengths))]}
    return encode(data, tokenizer or bert_like(), kind="rating")


def readings(batch: Any) -> list[Any]:
    """For each example its labels, its extra columns, and the token ids that are read of it."""
    count, inputs = len(batch), batch.inputs
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()

    def sequences(i: int) -> list[list[int]]:
        if batch.choices is None:
            return [ids[i][real[i]].tolist()]
        there = batch.choices[i].nonzero().flatten()
        return [ids[i, c][real[i, c]].tolist() for c in there]

    labels = batch.labels.reshape(count, -1).tolist()
    extra = [[values.flatten()[i].item() for values in batch.extra.values()] for i in range(count)]
    return [(labels[i], extra[i], sequences(i)) for i in range(count)]
