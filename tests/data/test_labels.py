"""Labels across rounds: by name where classes have names, by number where not, never by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

import bhpeft_pyro as bh
from bhpeft_pyro import Posterior
from bhpeft_pyro.cli.options import Reading
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data.sources import load
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
        with pytest.raises(DataError, match="row 0: 'dog' is a name, and the classes have none"):
            use(rows(["dog", "cat"] * 4))
    named = bh.data.encode(rows(["dog", "cat"] * 4), tiny_tokenizer(), kind="class")
    with pytest.raises(DataError, match=r"\('cat', 'dog'\); expected classes without names"):
        numbered.update(named)


def test_numbers_as_text_are_numbers(numbered: Posterior) -> None:
    # By rank "1" alone would be class 0.
    assert read(numbered, ["1"] * 8) == [1] * 8
    with pytest.raises(DataError, match="row 1: label 3; expected 0 to 1"):
        read(numbered, ["0", "3"] * 4)


def test_numbers_are_names_where_names_are_numbers(stars: Posterior) -> None:
    assert read(stars, [1, 2] * 4) == read(stars, [1.0, 2.0] * 4) == [0, 1] * 4
    with pytest.raises(DataError, match=r"row 0: '0' is not one of \('1', '2'\)"):
        read(stars, [0, 1] * 4)  # not an index
    truths = fitted(rows(["True", "False"] * 4))
    assert read(truths, [True, False] * 4) == [1, 0] * 4
    words = fitted(rows(["no", "yes"] * 4))
    assert read(words, [1, 0] * 4) == [1, 0] * 4  # indices: these are no names


def test_numbers_are_names_where_only_some_names_are_numbers() -> None:
    """A file of "1" and "2" alone is one of numbers, which are no places among the names."""
    names = ("1", "2", "other")
    model = tiny_model((), 3)
    mixed = bh.fit(model, "normal", rows(["1", "2", "other", "1"] * 2), max_steps=2, progress=False)
    assert mixed.columns.label_names == names
    assert read(mixed, [1, 2] * 4) == read(mixed, ["1", "2"] * 4) == [0, 1] * 4
    with pytest.raises(DataError, match=r"row 0: '0' is not one of \('1', '2', 'other'\)"):
        read(mixed, [0, 1] * 4)


def test_new_labels_are_found_by_what_they_are_called(stars: Posterior) -> None:
    assert stars.update(rows([1, 3] * 4, "w4"), grow=True).columns.label_names == ("1", "2", "3")
    known = fitted(hub(["a", "b"], [0, 1] * 4))
    new = hub(["a", "c", "b"], [1, 2] * 4)
    with pytest.raises(DataError, match="'c' is not among the labels"):
        known.update(new)
    grown = known.update(new, grow=True)
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


def test_of_unlabelled_texts_the_texts_alone_are_read() -> None:
    posterior = fitted(rows(["a", "b"] * 4), unlabelled=rows(["x", None] * 4))
    assert posterior.columns.label_names == ("a", "b")


def test_a_csv_file_gives_back_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows[1].csv"  # no pattern of names
    path.write_text(
        "id,text,code,stars,truth,late\n"
        "0001,NA,100,3,True,7\n"
        "0002,null,,3.5,False,8\n" + "0003,x,1,4,True,9\n" * 20_000 + "0004,y,2,5,True,A9\n"
    )
    table = load(path)
    assert table[:2] == {
        "id": ["0001", "0002"],
        "text": ["NA", "null"],
        "code": [100, None],
        "stars": [3.0, 3.5],
        "truth": ["True", "False"],
        "late": ["7", "8"],
    }
    assert table["late"][-1] == "A9"  # far behind where a reader would have made up its mind


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        ("3 3.50 -.5 +1 1e-3 0.", [3.0, 3.5, -0.5, 1.0, 0.001, 0.0]),
        ("3 -4 0", [3, -4, 0]),
        ("01 2", ["01", "2"]),
        ("12345678901234567890 1", ["12345678901234567890", "1"]),
        ("1_000 2", ["1_000", "2"]),
        ("nan 1", ["nan", "1"]),
    ],
)
def test_what_is_a_number_in_a_csv_file(tmp_path: Path, cells: str, read: list[Any]) -> None:
    path = tmp_path / "cells.csv"
    path.write_text("cell,more\n" + "".join(f"{cell},x\n" for cell in cells.split()))
    found = load(path)["cell"][:]
    assert found == read and [type(cell) for cell in found] == [type(cell) for cell in read]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("1.0 2.0 3.0", ("1", "2", "3")),
        ("True False True", ("False", "True")),
        ("0 1 0", None),
        ("0.0 1.0 0.0", ("0", "1")),
    ],
)
def test_classes_of_a_file_can_be_learnt(
    tmp_path: Path, labels: str, names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "rows.csv"
    cells = labels.split()
    path.write_text("text,label\n" + "".join(f"w{i},{c}\n" for i, c in enumerate(cells, 5)))
    found = infer(load(path), Reading(task="classes"))
    assert found.columns.label_names == names
    examples = bh.data.encode(path, tiny_tokenizer(), kind="class", columns=found.columns)
    assert examples.labels is not None
    order = sorted(set(cells))
    assert examples.labels.tolist() == [order.index(cell) for cell in cells]


def test_classes_are_found_again_where_their_names_are_written_otherwise() -> None:
    versions = rows(["1.10", "1.9", "beta", "beta"] * 2)
    model = tiny_model((), 3)
    columns = bh.Columns(label_names=("1.10", "1.9", "beta"))
    assert model.encode(versions, columns).labels.tolist() == [0, 1, 2, 2] * 2
    numbers = rows([1.1, 1.9] * 4)  # as a reader makes them of a file without "beta"
    assert model.encode(numbers, columns).labels.tolist() == [0, 1] * 4
    two = bh.Columns(label_names=("1.1", "1.10", "beta"))
    assert model.encode(rows(["1.1", "1.10"] * 4), two).labels.tolist() == [0, 1] * 4
    with pytest.raises(DataError, match=r"label_names: '1\.1' and '1\.10' are the same number"):
        model.encode(numbers, two)


def test_whole_floats_are_numbers_of_classes() -> None:
    """pandas makes floats of a column that has had a gap."""
    first = tiny_model().encode({"text": ["w5", "w6"], "label": [0, 1]})
    later = tiny_model().encode({"text": ["w5", "w6"], "label": [0.0, 1.0]})
    assert torch.equal(first.labels, later.labels) and later.labels.dtype == torch.int64
    with pytest.raises(DataError, match=r"row 1: 0\.5 is a float; expected an integer or a str"):
        tiny_model().encode({"text": ["w5", "w6"], "label": [0, 0.5]})


def test_truth_values_name_their_classes() -> None:
    data = {"text": ["w5 w20", "w6 w21"] * 4, "label": [True, False] * 4}
    fitted = bh.fit(tiny_model(()), "normal", data, max_steps=1, progress=False)
    assert fitted.columns.label_names == ("False", "True")
    words = fitted.encode({"text": ["w5", "w6"], "label": ["True", "False"]})
    assert words.labels.tolist() == [1, 0]


def test_names_that_look_alike_are_said() -> None:
    data = rows(["bad", "good", "good ", "bad"] * 2)
    with pytest.warns(UserWarning, match="'label': 'good' and 'good ' are two classes"):
        bh.data.encode(data, tiny_tokenizer(), kind="class")


@pytest.mark.parametrize("named", [True, False])
def test_truth_values_are_no_places_among_other_classes(numbered: Posterior, named: bool) -> None:
    """Of ("ham", "spam") the answers to "is it ham?" would be learnt the wrong way round."""
    first = fitted(rows(["ham", "spam"] * 4)) if named else numbered
    expected = r"one of \('ham', 'spam'\)" if named else "the number of a class"
    with pytest.raises(DataError, match=f"row 0: True is a bool; expected {expected}"):
        first.update(rows([True, False] * 4))


def test_names_are_the_same_in_every_unicode_form() -> None:
    composed, parts = "caf\u00e9", "cafe\u0301"
    both = [composed, parts, "bar", "bar"] * 2
    several = bh.data.encode(rows([[each] for each in both]), tiny_tokenizer(), kind="labels")
    assert several.label_names == ("bar", composed)
    first = fitted(rows(both))
    assert first.columns.label_names == ("bar", composed)
    assert read(first, [parts, "bar"] * 4) == [1, 0] * 4
    with pytest.raises(bh.errors.ConfigError, match="names not in"):
        first.grow([parts])
    task = infer(Dataset.from_dict(rows(both)), Reading())
    assert task.columns.label_names == ("bar", composed)
    # A posterior keeps the names that it was saved with.
    old = fitted(rows(["bar", parts] * 4), columns=bh.Columns(label_names=("bar", parts)))
    assert old.columns.label_names == ("bar", parts)
    assert read(old, both) == [1, 1, 0, 0] * 2
