"""Labels: by name, never by chance; in later rounds too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from program import write_csv

import bhpeft_pyro as bh
from bhpeft_pyro import Posterior
from bhpeft_pyro.cli.options import Reading
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data import Columns, Examples, encode, table
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_model, tiny_tokenizer

TEXTS = [f"w{5 + i % 2} w{10 + i}" for i in range(8)]


def rows(labels: list[Any], first: str = "") -> dict[str, list[Any]]:
    return {"text": [f"{first} {text}" for text in TEXTS], "label": labels}


def hub(names: list[str], labels: list[int]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(rows(labels, "w3"), features=features)


def fitted(data: object, **options: Any) -> Posterior:
    return bh.fit(tiny_model(()), "normal", data, max_steps=2, progress=False, **options)


@pytest.fixture(scope="module")
def numbered() -> Posterior:
    return fitted(rows([0, 1] * 4))


@pytest.fixture(scope="module")
def stars() -> Posterior:
    return fitted(rows(["1", "2"] * 4))


def read(posterior: Posterior, labels: list[Any]) -> list[int]:
    examples = posterior.encode(rows(labels))
    assert examples.labels is not None
    return examples.labels.tolist()


def test_names_are_no_numbers_by_their_order(numbered: Posterior) -> None:
    # By alphabet "cat" would be 0 and "dog" 1.
    for use in (numbered.update, numbered.evaluate, numbered.diagnose):
        with pytest.raises(DataError, match=r"'dog'.* is not among|'dog' is not one of"):
            use(rows(["dog", "cat"] * 4))
    named = encode(rows(["dog", "cat"] * 4), tiny_tokenizer(), kind="class")
    for use in (numbered.update, numbered.evaluate):
        with pytest.raises(DataError, match="'dog'"):
            use(named)


def test_numbers_as_text_are_numbers(numbered: Posterior) -> None:
    # By rank "1" alone would be class 0.
    assert read(numbered, ["1"] * 8) == [1] * 8
    with pytest.raises(DataError, match=r"row 1: '3' is not one of \('0', '1'\)"):
        read(numbered, ["0", "3"] * 4)


def test_numbers_are_names_where_some_names_are_numbers(stars: Posterior) -> None:
    """A file of "1" and "2" alone is one of numbers, which are no places among these names."""
    mixed = Columns(label_names=("1", "2", "other"))
    for labels in ([1, 2] * 4, ["1", "2"] * 4):
        assert tiny_model((), 3).encode(rows(labels), mixed).labels.tolist() == [0, 1] * 4
    with pytest.raises(DataError, match=r"row 0: '0' is not one of \('1', '2', 'other'\)"):
        tiny_model((), 3).encode(rows([0, 1] * 4), mixed)
    assert read(stars, [1, 2] * 4) == read(stars, [1.0, 2.0] * 4) == [0, 1] * 4
    with pytest.raises(DataError, match=r"row 0: '0' is not one of \('1', '2'\)"):
        read(stars, [0, 1] * 4)  # not an index
    truths = fitted(rows(["True", "False"] * 4))
    assert read(truths, [True, False] * 4) == [1, 0] * 4
    words = fitted(rows(["no", "yes"] * 4))
    assert read(words, [1, 0] * 4) == [1, 0] * 4  # places: these are no names
    with pytest.raises(DataError, match=r"row 0: '2' is not one of the positions 0 to 1 in"):
        read(words, [2, 0] * 4)


def test_new_labels_are_found_by_what_they_are_called(stars: Posterior) -> None:
    assert stars.update(rows([1, 3] * 4, "w4"), grow=True).columns.label_names == ("1", "2", "3")
    known = fitted(hub(["a", "b"], [0, 1] * 4))
    new = hub(["a", "c", "b"], [1, 2] * 4)
    with pytest.raises(DataError, match="'c' is not among the labels"):
        known.update(new)
    grown = known.update(new, grow=True, again=True)
    assert grown.columns.label_names == ("a", "b", "c")
    examples = grown.encode(new)
    assert examples.labels is not None and examples.labels.tolist() == [2, 1] * 4


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_a_prediction_needs_no_labels(stars: Posterior, missing: object) -> None:
    partly = pd.DataFrame(rows(["1", missing] * 4))
    with pytest.warns(UserWarning, match="'label': 4 of 8 labels are missing, so none is used"):
        assert stars.predict(partly).labels is None
    with pytest.raises(DataError, match="row 1: the label is"):
        stars.evaluate(partly)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("1.0 2.0 3.0", ("1", "2", "3")),
        ("True False True", ("False", "True")),
        ("0 1 0", ("0", "1")),
        ("250.1 250.10 250.1", ("250.1", "250.10")),
        ("250.00 401.0 250.00", ("250", "401")),
        ("0.0 1.0 0.0", ("0", "1")),
    ],
)
def test_classes_of_a_file_can_be_learnt(
    tmp_path: Path, labels: str, names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "rows.csv"
    cells = labels.split()
    path.write_text("text,label\n" + "".join(f"w{i},{c}\n" for i, c in enumerate(cells, 5)))
    reading = Reading(task="classes")
    found = infer(table(path, reading.texts), reading)
    assert found.columns.label_names == names
    examples = encode(path, tiny_tokenizer(), kind="class", columns=found.columns)
    assert examples.labels is not None
    order = sorted(set(cells))
    assert examples.labels.tolist() == [order.index(cell) for cell in cells]


def test_classes_are_found_again_where_their_names_are_written_otherwise(tmp_path: Path) -> None:
    versions = rows(["1.10", "1.9", "beta", "beta"] * 2)
    model = tiny_model((), 3)
    columns = Columns(label_names=("1.10", "1.9", "beta"))
    assert model.encode(versions, columns).labels.tolist() == [0, 1, 2, 2] * 2
    with pytest.raises(DataError, match=r"row 0: 1\.1 is a float; expected a text"):
        model.encode(rows([1.1, 1.9] * 4), columns)  # 1.1 may have been "1.10"
    path = tmp_path / "versions.csv"
    path.write_text("text,label\nw5,1.10\nw6,1.9\n")
    assert model.encode(path, columns).labels.tolist() == [0, 1]
    path.write_text("text,label\nw5,1.1\nw6,1.9\n")
    with pytest.raises(DataError, match=r"'1\.1' is not one of \('1\.10', '1\.9', 'beta'\)"):
        model.encode(path, columns)
    path.write_text("text,label\nw5,3.0\nw6,x\n")  # as pandas writes 3 after a gap
    assert model.encode(path, Columns(label_names=("3", "x", "y"))).labels.tolist() == [0, 1]
    for forms in ("0.00 1.00", "+0 +1", "0. 1.", "0.0 1"):
        path.write_text("text,label\n" + "".join(f"w5,{form}\n" for form in forms.split()))
        known = Columns(label_names=("0", "1", "2"))
        assert model.encode(path, known).labels.tolist() == [0, 1]
    two = Columns(label_names=("1.1", "1.10", "beta"))
    assert model.encode(rows(["1.1", "1.10"] * 4), two).labels.tolist() == [0, 1] * 4


def test_whole_floats_and_truth_values_are_classes() -> None:
    """pandas makes floats of a column that has had a gap."""
    floats = encode(rows([0.0, 1.0] * 4), tiny_tokenizer(), kind="class")
    assert floats.labels.tolist() == [0, 1] * 4 and floats.labels.dtype == torch.int64
    truths = encode(rows([True, False] * 4), tiny_tokenizer(), kind="class")
    assert truths.label_names == ("False", "True") and truths.labels.tolist() == [1, 0] * 4


@pytest.mark.parametrize("named", [True, False])
def test_truth_values_are_no_places_among_other_classes(numbered: Posterior, named: bool) -> None:
    """Of ("ham", "spam") the answers to "is it ham?" would be learnt the wrong way round."""
    first = fitted(rows(["ham", "spam"] * 4)) if named else numbered
    expected = "'False', 'True' is not among the labels " + str(first.columns.label_names)
    with pytest.raises(DataError, match=re.escape(expected)):
        first.update(rows([True, False] * 4))


def test_ordered_classes_need_their_order() -> None:
    """Else "high" would lie below "low", and no error would tell."""
    order = ["low", "mid", "high"]
    table = pd.DataFrame({"text": ["w5", "w6", "w7 w8"], "label": ["low", "high", "mid"]})
    ranked = tiny_model((), 1, likelihood=bh.likelihoods.OrderedLogistic(3))
    with pytest.raises(
        DataError, match=r"'label': the classes \('high', 'low', 'mid'\) are ordered"
    ):
        ranked.encode(table)
    sorted_by_hand = table.assign(label=pd.Categorical(table["label"], order, ordered=True))
    for data, columns in (
        (table, bh.Columns(label_names=order)),
        (sorted_by_hand, bh.Columns()),
    ):
        examples = ranked.encode(data, columns)
        assert examples.label_names == ("low", "mid", "high")
        assert examples.labels is not None and examples.labels.tolist() == [0, 2, 1]
    stars = ranked.encode(table.replace({"low": "1 *", "mid": "2 *", "high": "3 *"}))
    assert stars.label_names == ("1 *", "2 *", "3 *")
    for names in (
        ("-1", "2", "10"),
        ("level-1", "level-2", "level-3"),  # a hyphen is no minus
        ("-1.5 V", "-1.2 V", "0 V"),
        ("0-5", "6-10", "11-20"),
    ):
        named = table.replace(dict(zip(order, names, strict=True)))
        assert ranked.encode(named).label_names == names
    for names in (("1 bad", "1 good", "2"), ("0 to 500", "500 to 1,000", "1,000 to 2,000")):
        named = table.replace(dict(zip(order, names, strict=True)))
        with pytest.raises(DataError, match="are ordered, and their names do not say how"):
            ranked.encode(named)
    grades = table.replace({"low": "A", "mid": "B", "high": "C"})  # in alphabetical order
    encoded = ranked.encode(grades, bh.Columns(label_names=["A", "B", "C"]))
    assert ranked.encode(encoded).label_names == ("A", "B", "C")
    graded = grades.assign(label=pd.Categorical(grades["label"], ["A", "B", "C"], ordered=True))
    assert ranked.encode(graded[:2]).label_names == ("A", "B", "C")
    # Where the order does not matter, it is kept too, and unordered categories are names alone.
    plain = tiny_model((), 3)
    assert plain.encode(sorted_by_hand).label_names == ("low", "mid", "high")
    without = sorted_by_hand[sorted_by_hand["label"] != "mid"]  # whose category is still known
    assert tiny_model((), 2).encode(without).label_names == ("low", "high")
    unordered = table.assign(label=table["label"].astype("category"))
    assert plain.encode(unordered).label_names == ("high", "low", "mid")


def test_names_are_the_same_in_every_unicode_form() -> None:
    composed, parts = "caf\u00e9", "cafe\u0301"
    both = [composed, parts, "bar", "bar"] * 2
    lists = encode(rows([[each] for each in both]), tiny_tokenizer(), kind="labels")
    assert lists.label_names == ("bar", composed)
    first = fitted(rows(both))
    assert first.columns.label_names == ("bar", composed)
    assert read(first, [parts, "bar"] * 4) == [1, 0] * 4
    with pytest.raises(bh.errors.ConfigError, match="names not in"):
        first.grow([parts])
    task = infer(table(rows(both)), Reading())
    assert task.columns.label_names == ("bar", composed)
    decomposed = fitted(rows(["bar", parts] * 4), columns=Columns(label_names=("bar", parts)))
    assert decomposed.columns.label_names == ("bar", composed)
    assert read(decomposed, both) == [1, 1, 0, 0] * 2


THREE = ["w5 w6", "w7", "w8 w9 w10"]
CELLS = [["sport", "art"], [], ["art"]]
MATRIX = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
NAMES = ("art", "money", "sport")


def several(label: Any, **options: Any) -> Examples:
    return encode({"text": THREE, "label": label}, tiny_tokenizer(), kind="labels", **options)


def matrix(examples: Examples) -> list[list[float]]:
    assert examples.labels is not None and examples.labels.dtype == torch.float32
    found: list[list[float]] = examples.labels.tolist()
    return found


def test_names_in_lists() -> None:
    named = Columns(label_names=NAMES)
    assert matrix(several(CELLS, columns=named)) == MATRIX
    own = several(CELLS)  # those that occur, sorted
    assert own.label_names == ("art", "sport")
    assert matrix(several([[], [], []], columns=named)) == [[0.0] * 3] * 3
    with pytest.warns(UserWarning, match="1 of 3 labels are missing, so none is used"):
        assert several([None, ["a"], ["b"]], labelled=False).labels is None


def test_numbers_0_and_1_class_labels_and_csv_files(tmp_path: Path) -> None:
    ones = [[bool(each) for each in row] for row in MATRIX]
    for cells in (MATRIX, ones, [[int(each) for each in row] for row in MATRIX]):
        examples = several(cells, classes=3)
        assert matrix(examples) == MATRIX and examples.label_names == ("0", "1", "2")
        assert several(cells).label_names == ("0", "1", "2")
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=[*NAMES]))})
    rows = {"text": THREE, "label": [[2, 0], [], [0]]}
    examples = encode(Dataset.from_dict(rows, features=features), tiny_tokenizer(), kind="labels")
    assert matrix(examples) == MATRIX and examples.label_names == NAMES
    file = write_csv(tmp_path / "data.csv", text=THREE, label=map(json.dumps, CELLS))
    examples = encode(file, tiny_tokenizer(), kind="labels", columns=Columns(label_names=NAMES))
    assert matrix(examples) == MATRIX


def test_some_labels_of_minus_1_are_missing_ones() -> None:
    rows = {"text": ["w5", "w6"], "label": [0, -1]}
    with pytest.warns(UserWarning, match="1 of 2 labels are missing, so none is used"):
        assert encode(rows, tiny_tokenizer(), kind="class", labelled=False).labels is None


@pytest.mark.parametrize("cell", [" 3.5", "3.50000000000000000", "+3.5"])
def test_a_rating_in_another_form_is_a_number(cell: str, tmp_path: Path) -> None:
    """It makes the reader of a CSV file keep the whole column as text."""
    file = write_csv(tmp_path / "x.csv", text=["w5", "w6", "w7"], label=["1", "2", cell])
    read = encode(file, tiny_tokenizer(), kind="rating").labels
    assert read is not None and read.tolist() == [1.0, 2.0, 3.5]


def test_only_the_cell_that_is_no_rating_is_named(tmp_path: Path) -> None:
    for cell in ("much", "1_000"):
        file = write_csv(tmp_path / "x.csv", text=["w5", "w6", "w7"], label=["1", cell, "3"])
        with pytest.raises(DataError, match=f"row 3: '{cell}' is not a number") as error:
            encode(file, tiny_tokenizer(), kind="rating")
        assert error.value.rows == (1,)


def test_an_answer_is_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    """Choices that are numbers: an answer of a CSV file is one of them before it is an index."""
    quiz = {"question": ["w7", "w8"], "answer": ["2", "2"]}
    choices = [["1", "2", "3"], ["w9", "w10", "w11"]]
    csv = write_csv(tmp_path / "quiz.csv", **quiz, choices=map(json.dumps, choices))
    read = encode(csv, tiny_tokenizer(), kind="choice").labels
    given = encode({**quiz, "choices": choices}, tiny_tokenizer(), kind="choice").labels
    gaps = {**quiz, "answer": [1.0, 2.0], "choices": choices}  # which pandas has made floats
    floats = encode(gaps, tiny_tokenizer(), kind="choice").labels
    for labels in (read, given, floats):
        assert labels is not None and labels.tolist() == [1, 2]


def test_names_of_a_feature_may_be_in_another_normal_form() -> None:
    decomposed = hub(["cafe\u0301", "tea"], [0, 1] * 4)
    columns = Columns(label_names=("tea", "caf\u00e9"))
    examples = encode(decomposed, tiny_tokenizer(), kind="class", columns=columns)
    assert examples.labels is not None and examples.labels.tolist() == [1, 0] * 4
