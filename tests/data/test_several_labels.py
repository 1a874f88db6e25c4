"""Several labels a text, and extra columns of numbers, from tables to batches."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from bhpeft_pyro.data import Columns, Examples, encode
from bhpeft_pyro.data.examples import describe, revive
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.testing import tiny_tokenizer

TEXTS = ["w5 w6", "w7", "w8 w9 w10"]
CELLS = [["sport", "art"], [], ["art"]]
MATRIX = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
NAMES = ("art", "money", "sport")


def read(label: Any, text: list[str] = TEXTS, **options: Any) -> Examples:
    return encode({"text": text, "label": label}, tiny_tokenizer(), kind="labels", **options)


def matrix(examples: Examples) -> list[list[float]]:
    assert examples.labels is not None and examples.labels.dtype == torch.float32
    found: list[list[float]] = examples.labels.tolist()
    return found


def test_names_in_lists() -> None:
    named = Columns(label_names=NAMES)
    assert matrix(read(CELLS, columns=named)) == MATRIX
    own = read(CELLS)  # those that occur, sorted
    assert own.label_names == ("art", "sport") and own.num_labels == 2
    assert matrix(read([[], [], []], columns=named)) == [[0.0] * 3] * 3


def test_numbers_0_and_1_class_labels_and_csv_files(tmp_path: Path) -> None:
    ones = [[bool(each) for each in row] for row in MATRIX]
    for cells in (MATRIX, ones, [[int(each) for each in row] for row in MATRIX]):
        examples = read(cells, num_labels=3)
        assert matrix(examples) == MATRIX and examples.label_names is None
        assert read(cells).num_labels == 3
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=[*NAMES]))})
    rows = {"text": TEXTS, "label": [[2, 0], [], [0]]}
    examples = encode(Dataset.from_dict(rows, features=features), tiny_tokenizer(), kind="labels")
    assert matrix(examples) == MATRIX and examples.label_names == NAMES
    file = tmp_path / "data.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(
            [("text", "label"), *zip(TEXTS, map(json.dumps, CELLS), strict=True)]
        )
    examples = encode(file, tiny_tokenizer(), kind="labels", columns=Columns(label_names=NAMES))
    assert matrix(examples) == MATRIX


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([["a", "b"], "c", ["a"]], {}, "column 'label'"),
        ([["a", "b"], None, ["a"]], {}, "row 1: the label is missing"),
        ([["a"], ["b"], ["z"]], {"columns": Columns(label_names=["a", "b"])}, "row 2: 'z' is not"),
        ([["a"], ["b"], []], {"num_labels": 3}, r"has 2 labels: \('a', 'b'\)"),
        ([["a"], ["b"], []], {"new_names": False}, "the labels of this model have none"),
        ([["a"], ["a"], []], {"num_labels": 2}, r"has 1 labels: \('a',\)"),
        ([[1, 0], [1], [0, 1]], {}, r"row 1: \[1\]; expected a list of names of labels, or 2"),
        ([[1, 0], [2, 0], [0, 1]], {}, r"row 1: \[2, 0\]"),
        ([[1, 0]] * 3, {"num_labels": 3}, "row 0: .* or 3 numbers 0 or 1"),
        (["['a']", "[]", "[]"], {}, "row 0: .* is not a list; expected JSON"),
        (["[" * 10**5, "[]", "[]"], {}, "row 0: .* is not a list; expected JSON"),
        ([["a"], ["b"], ["a", None]], {}, r"row 2: None is not one of \('a', 'b'\)"),
        ([["a"], [" "], []], {}, r"row 1: ' ' is not one of \('a',\)"),
        ([[], [], []], {}, r"row 0: \[\]; expected a number 0 or 1 for each label, or names"),
        ([[], [1, 0], [0, 1]], {}, r"row 0: \[\]; expected a number 0 or 1"),
    ],
)
def test_bad_cells_are_named(cells: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(cells, **options)


@pytest.mark.parametrize("bad", [-1, None])
def test_class_labels_that_are_missing_are_named(bad: int | None) -> None:
    feature = ClassLabel(names=["a", "b"])
    features = Features({"text": Value("string"), "label": Sequence(feature)})
    table = Dataset.from_dict({"text": TEXTS, "label": [[0], [], [1, bad]]}, features=features)
    with pytest.raises(DataError, match=f"row 2: {bad} is not one of"):
        encode(table, tiny_tokenizer(), kind="labels")


def test_without_labels() -> None:
    assert read([None, ["a"], ["b"]], labelled=False).labels is None


def test_labels_follow_their_texts_and_can_be_shared_out() -> None:
    examples = read(MATRIX * 2, text=[f"w{i} " * (i - 4) for i in range(5, 11)])
    whole = torch.tensor(MATRIX * 2)
    for indices, batch in examples.by_length(4):
        assert torch.equal(batch.labels, whole[indices])  # type: ignore[arg-type]
    batch = next(examples.batches(6)).split(1).split(2)  # sharing out again changes nothing
    assert batch.labels is not None and batch.labels.shape == (2, 3, 3)
    assert torch.equal(batch.labels.flatten(0, 1), whole)
    assert examples.subset([2, 0]).concat(examples.subset([1])).labels is not None
    shuffled, other = examples.subset([5, 4, 3, 2, 1, 0]), read([[1, 1, 1], *MATRIX[1:]])
    assert shuffled.fingerprint == examples.fingerprint
    assert read(MATRIX).fingerprint != other.fingerprint


def test_extra_columns_follow_their_texts() -> None:
    table = {"text": TEXTS * 2, "label": [0.5, 1, 2, 3, 4, 5], "hours": [6, 5, 4, 3, 2, 1]}
    columns = Columns(extra=["hours"])
    examples = encode(table, tiny_tokenizer(), kind="rating", columns=columns)
    for _, batch in examples.by_length(4):
        assert torch.equal(batch.extra["hours"], 6 - batch.labels.floor())  # type: ignore[union-attr]
    assert next(examples.batches(6)).split(3).extra["hours"].tolist() == [[6, 5], [4, 3], [2, 1]]
    assert examples.subset([2]).concat(examples.subset([0])).extra["hours"].tolist() == [4, 6]
    plain, tensors = describe(examples)
    assert torch.equal(
        revive(json.loads(json.dumps(plain)), tensors).extra["hours"].int(),
        examples.extra["hours"].int(),
    )
    other = encode(table | {"hours": [1] * 6}, tiny_tokenizer(), kind="rating", columns=columns)
    assert other.fingerprint != examples.fingerprint
    without = encode(table, tiny_tokenizer(), kind="rating")
    with pytest.raises(DataError, match="differ in extra columns"):
        examples.concat(without)
    with pytest.raises(DataError, match="without the column 'hours'; encode it again"):
        encode(without, tiny_tokenizer(), kind="rating", columns=columns)


def test_bad_extra_columns_are_named() -> None:
    def encoded(columns: Columns = Columns(extra=["hours"]), **table: Any) -> Examples:
        return encode(
            {"text": TEXTS, "label": [1.0, 2.0, 3.0]} | table,
            tiny_tokenizer(),
            kind="rating",
            columns=columns,
        )

    with pytest.raises(DataError, match="column 'hours' is missing"):
        encoded()
    with pytest.raises(DataError, match="column 'hours', row 1: the number is missing"):
        encoded(hours=[1, None, 2])
    with pytest.raises(DataError, match="'hours', row 2: 'x' is not a number; expected a number"):
        encoded(hours=["1", "2", "x"])
    with pytest.raises(ConfigError, match="'label' must be different columns"):
        Columns(extra=["label"])
    with pytest.raises(ConfigError, match="extra='hours'; expected a sequence of str"):
        Columns(extra="hours")


def test_examples_with_another_number_of_labels_are_refused() -> None:
    two, three = read([row[:2] for row in MATRIX]), read(MATRIX)
    with pytest.raises(DataError, match="source has 2 labels; expected 3"):
        encode(two, tiny_tokenizer(), kind="labels", num_labels=3)
    assert encode(three, tiny_tokenizer(), kind="labels", num_labels=3) is three
    with pytest.raises(DataError, match="differ in num_labels"):
        three.concat(two)
