"""Whatever the source, the same rows give the same examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from program import write_csv
from toy_tokenizers import bert_like

from bhpeft_pyro.data import Columns, Examples, encode, sources
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_model

TEXTS = ["good film", "NA", "a very bad, bad plot", 'not "so" dull', "null"]
CLASSES = ["pos", "neg", "neg", "pos", "neutral"]
RATINGS = [1.5, -2.0, 0.25, 3.0, -0.5]
QUESTIONS = ["why was the film long", "is the plot good", "a"]
CHOICES = [["yes", "no"], ["so so", "bad", "not very good", "dull"], ["the", "a", "long"]]
ANSWERS = [1, 3, 0]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def same(one: Examples, other: Examples) -> bool:
    return (
        one.fingerprint == other.fingerprint
        and one.texts == other.texts
        and one.label_names == other.label_names
        and one.num_labels == other.num_labels
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_every_form(columns: dict[str, list[Any]], folder: Path, with_csv: bool) -> list[Any]:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = Dataset.from_dict(columns)
    forms = [
        columns,
        {**columns, "junk": [object() for _ in rows]},  # columns nobody asked for do no harm
        rows,
        tuple(rows),
        table,
        table.with_format("torch"),
        write_jsonl(folder / "rows.jsonl", rows),
        str(folder / "rows.jsonl"),
        write_jsonl(folder / "rows.json", rows),
    ]
    if with_csv:
        forms.append(str(write_csv(folder / "ROWS.CSV", **columns)))
    return forms


@pytest.mark.parametrize("labels", [CLASSES, [0, 1, 1, 0, 2]])
def test_classes_are_the_same_from_every_source(labels: list[Any], tmp_path: Path) -> None:
    columns = {"review": TEXTS, "sentiment": labels}
    options: Any = {"kind": "class", "columns": Columns(text="review", label="sentiment")}
    forms = in_every_form(columns, tmp_path, with_csv=True)
    results = [encode(form, bert_like(), **options) for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert results[0].texts == tuple(TEXTS)
    names = ("neg", "neutral", "pos") if labels is CLASSES else None
    assert results[0].label_names == names
    assert results[0].num_labels == 3
    assert results[0].labels is not None and results[0].labels.dtype == torch.int64
    assert results[0].labels.tolist() == ([2, 0, 0, 2, 1] if names else labels)


def test_ratings_are_the_same_from_every_source(tmp_path: Path) -> None:
    forms = in_every_form({"text": TEXTS, "label": RATINGS}, tmp_path, with_csv=True)
    forms += [
        {"text": TEXTS, "label": np.array(RATINGS)},
        {"text": np.array(TEXTS), "label": torch.tensor(RATINGS)},
        {"text": tuple(TEXTS), "label": (value for value in RATINGS)},
    ]
    results = [encode(form, bert_like(), kind="rating") for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert torch.equal(results[0].labels, torch.tensor(RATINGS))
    assert results[0].num_labels is None


def test_choices_are_the_same_from_every_source(tmp_path: Path) -> None:
    columns = {"question": QUESTIONS, "choices": CHOICES, "answer": ANSWERS}
    forms = in_every_form(columns, tmp_path, with_csv=False)
    letters = [{"text": options, "label": list("ABCD"[: len(options)])} for options in CHOICES]
    numbers = [
        {"text": options, "label": [*map(kind, range(1, len(options) + 1))]}
        for kind in (str, int)
        for options in CHOICES
    ]
    forms += [
        {**columns, "choices": own, "answer": [kind(answer + 1) for answer in ANSWERS]}
        for own in (numbers[:3], numbers[3:])
        for kind in (str, int)  # a CSV reader makes 1 of "1"
    ]
    forms += [
        {**columns, "choices": letters},
        {**columns, "choices": letters, "answer": ["B", "D", "A"]},  # as on the hub
        {**columns, "answer": ["no", "dull", "the"]},
        {**columns, "choices": [tuple(options) for options in CHOICES]},
    ]
    results = [encode(form, bert_like(), kind="choice") for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert results[0].texts == tuple(QUESTIONS)
    assert results[0].labels is not None and results[0].labels.tolist() == ANSWERS


def test_without_labels() -> None:
    options: Any = {"labelled": False}
    bare = encode(TEXTS, bert_like(), kind="class", **options)
    assert bare.labels is None
    for source in (
        {"text": TEXTS},
        {"text": TEXTS, "label": [-1] * 5},
        {"text": TEXTS, "label": [None] * 5},
    ):
        assert same(encode(source, bert_like(), kind="class", **options), bare)
    with pytest.warns(UserWarning, match="'label': 2 of 5 labels are missing, so none is used"):
        some = {"text": TEXTS, "label": [None, None, *CLASSES[2:]]}
        assert encode(some, bert_like(), kind="class", **options).labels is None
    for values, how in (([-1.0] * 5, {"kind": "rating"}), (["-1"] * 5, {"kind": "class"})):
        source = {"text": TEXTS, "label": values}
        assert encode(source, bert_like(), **how, **options).labels is not None
    named = Columns(label_names=("-1", "1"))
    source = {"text": TEXTS, "label": [-1] * 5}
    assert encode(source, bert_like(), kind="class", columns=named, **options).labels is not None
    there = encode({"text": TEXTS, "label": CLASSES}, bert_like(), kind="class", **options)
    assert there.labels is not None and there.fingerprint != bare.fingerprint

    pairs = encode(
        list(zip(QUESTIONS, CHOICES, strict=True)), bert_like(), kind="choice", **options
    )
    rows = {"question": QUESTIONS, "choices": CHOICES}
    assert same(pairs, encode(rows, bert_like(), kind="choice", **options))

    two = Columns(pair="other")
    couples = encode([("good", "bad")], bert_like(), kind="rating", columns=two, **options)
    row = [{"text": "good", "other": "bad"}]
    assert same(couples, encode(row, bert_like(), kind="rating", columns=two, **options))


def test_class_label_features_carry_their_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"text": TEXTS[:3], "label": [1, 0, 1]}, features=features)
    plain = encode(table, bert_like(), kind="class")
    assert plain.label_names == ("neg", "pos")
    # Another order, and one class more: mapped by name, not by index.
    turned = encode(
        table, bert_like(), kind="class", columns=Columns(label_names=["pos", "mixed", "neg"])
    )
    assert turned.labels is not None and turned.labels.tolist() == [0, 2, 0]
    assert turned.num_labels == 3
    with pytest.raises(DataError, match=r"row 0.*'pos' is not one of"):
        encode(table, bert_like(), kind="class", columns=Columns(label_names=["good", "neg"]))

    hidden = Dataset.from_dict({"text": TEXTS[:2], "label": [-1, -1]}, features=features)
    assert encode(hidden, bert_like(), kind="class", labelled=False).labels is None
    with pytest.raises(DataError, match="labelled=False"):
        encode(hidden, bert_like(), kind="class")


def test_given_names_set_the_order() -> None:
    data = {"text": TEXTS, "label": CLASSES}
    names = ["pos", "neutral", "neg", "unseen"]
    named = encode(data, bert_like(), kind="class", columns=Columns(label_names=names))
    assert named.labels is not None and named.labels.tolist() == [0, 2, 2, 0, 1]
    assert named.num_labels == 4 and named.label_names == tuple(names)
    ints = {"text": TEXTS[:2], "label": [0, 3]}
    assert encode(
        ints, bert_like(), kind="class", columns=Columns(label_names=names)
    ).label_names == tuple(names)
    assert encode(ints, bert_like(), kind="class", num_labels=6).num_labels == 6
    assert encode({**ints, "label": [True, False]}, bert_like(), kind="class").num_labels == 2


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("stanfordnlp/imdb", ("stanfordnlp/imdb", None, "train")),
        ("stanfordnlp/imdb:test", ("stanfordnlp/imdb", None, "test")),
        ("nyu-mll/glue[sst2]", ("nyu-mll/glue", "sst2", "train")),
        ("a.b/c-d_e[x y.z]:validation[:10%]", ("a.b/c-d_e", "x y.z", "validation[:10%]")),
    ],
)
def test_hub_names(name: str, called: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, *, name: str | None, split: str) -> Dataset:
        calls.append((path, name, split))
        return Dataset.from_dict({"text": TEXTS, "label": CLASSES})

    monkeypatch.setattr(sources, "load_dataset", load)
    result = encode(name, bert_like(), kind="class")
    assert calls == [called]
    assert same(result, encode({"text": TEXTS, "label": CLASSES}, bert_like(), kind="class"))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing.*cannot be loaded") as caught:
        encode("nobody/nothing", bert_like(), kind="class")
    assert caught.value.__cause__ is not None


def test_examples_pass_through_if_they_fit() -> None:
    ready = encode({"text": TEXTS, "label": CLASSES}, bert_like(), kind="class")
    assert encode(ready, bert_like(), kind="class") is ready
    assert (
        encode(
            ready, bert_like(), kind="class", columns=Columns(label_names=["neg", "neutral", "pos"])
        )
        is ready
    )
    bare = encode(TEXTS, bert_like(), kind="class", labelled=False)
    assert encode(bare, bert_like(), kind="class", labelled=False) is bare


def test_examples_get_the_names_that_are_given() -> None:
    ready = encode({"text": TEXTS, "label": [0, 1, 2, 1, 0]}, bert_like(), kind="class")
    names = Columns(label_names=["neg", "neutral", "pos"])
    assert ready.label_names is None
    found = encode(ready, bert_like(), kind="class", columns=names)
    assert found.label_names == ("neg", "neutral", "pos")
    assert torch.equal(found.labels, ready.labels)


def test_rows_at_the_end_of_a_large_file_may_have_other_types_and_columns(tmp_path: Path) -> None:
    """Readers that look at the first part of a file alone fail on them."""
    path = tmp_path / "large.jsonl"
    row = json.dumps({"text": "w5 " * 300, "label": 3, "day": "2024-03-01"})
    last = json.dumps({"text": "w6", "label": 3.5, "day": "2024-03-02", "note": "new"})
    path.write_text(f"{row}\n" * 12_000 + f"{last}\n")
    assert path.stat().st_size > 10 * 2**20
    table = sources.load(path)
    assert len(table) == 12_001 and table[-1]["label"] == 3.5 and table[0]["note"] is None
    assert table[0]["day"] == "2024-03-01"


def test_cells_that_python_does_not_read_as_numbers_are_texts(tmp_path: Path) -> None:
    cells = {"signed": ["+5", "-3.5"], "twice": ["+-5", "+-3"], "code": ["007", "010"]}
    lines = [",".join(cells), *map(",".join, zip(*cells.values(), strict=True))]
    (tmp_path / "cells.csv").write_text("\n".join(lines))
    table = sources.load(tmp_path / "cells.csv")
    assert table["signed"][:] == [5.0, -3.5]
    assert table["twice"][:] == ["+-5", "+-3"] and table["code"][:] == ["007", "010"]


def test_a_transform_is_not_dropped_in_silence() -> None:
    table = Dataset.from_dict({"text": ["w5", "w6"]})
    turned = table.with_transform(lambda batch: {"text": ["w9" for _ in batch["text"]]})
    with pytest.raises(DataError, match=r"source has a transform, .* source\.map"):
        tiny_model().encode(turned, labelled=False)


def test_a_column_of_a_data_set_is_a_list_of_texts() -> None:
    options: Any = {"kind": "class", "labelled": False}
    bare = encode(TEXTS, bert_like(), **options)
    series, column = pd.Series(TEXTS), Dataset.from_dict({"text": TEXTS})["text"]
    for texts in (column, pd.Index(TEXTS), series, series.to_numpy(), iter(TEXTS)):
        assert same(encode(texts, bert_like(), **options), bare)
    rows = {"text": TEXTS, "label": CLASSES}
    table = pd.DataFrame(rows, index=[f"row {i}" for i in range(5)])
    assert same(*(encode(each, bert_like(), kind="class") for each in (table, rows)))


@pytest.mark.parametrize("gap", [float("nan"), None, pd.NA, np.nan])
def test_a_gap_is_a_gap_in_the_first_row_too(gap: Any) -> None:
    for column, values in (("text", [gap, *TEXTS[1:]]), ("label", [gap, *CLASSES[1:]])):
        rows = {"text": TEXTS, "label": CLASSES, column: values}
        with pytest.raises(DataError, match=f"'{column}', row 0: the {column} is missing"):
            encode(rows, bert_like(), kind="class")
