"""Whatever the source, the same rows give the same examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from program import write_csv, write_lines
from toy_tokenizers import bert_like

from bhpeft_pyro.data import Columns, Examples, encode, sources
from bhpeft_pyro.data.sources import load, records
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_model, tiny_tokenizer

TEXTS = ["good film", "NA", "a very bad, bad plot", 'not "so" dull', "null"]
CLASSES = ["pos", "neg", "neg", "pos", "neutral"]
TABLE = {"text": TEXTS, "label": CLASSES}
RATINGS = [1.5, -2.0, 0.25, 3.0, -0.5]
QUESTIONS = ["why was the film long", "is the plot good", "a"]
CHOICES = [["yes", "no"], ["so so", "bad", "not very good", "dull"], ["the", "a", "long"]]
ANSWERS = [1, 3, 0]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(source: Any, kind: Any = "class", **options: Any) -> Examples:
    return encode(source, bert_like(), kind=kind, **options)


def same(one: Examples, other: Examples) -> bool:
    return (
        one.fingerprint == other.fingerprint
        and one.texts == other.texts
        and one.label_names == other.label_names
        and one.num_labels == other.num_labels
    )


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def in_every_form(columns: dict[str, list[Any]], folder: Path) -> list[Any]:
    rows, table = rows_of(columns), Dataset.from_dict(columns)
    return [
        columns,
        {**columns, "junk": [object() for _ in rows]},  # columns nobody asked for do no harm
        rows,
        tuple(rows),
        table,
        table.with_format("torch"),
        table.to_iterable_dataset().with_format("torch"),
        table.to_iterable_dataset().map(lambda row: row),  # which does not know its columns
        pd.DataFrame(columns, index=[f"row {i}" for i in range(len(rows))]),
        str(write_lines(folder / "rows.jsonl", rows)),
        write_lines(folder / "rows.json", rows),
    ]


@pytest.mark.parametrize("labels", [CLASSES, [0, 1, 1, 0, 2]])
def test_classes_are_the_same_from_every_source(labels: list[Any], tmp_path: Path) -> None:
    columns = {"review": TEXTS, "sentiment": labels}
    options: Any = {"columns": Columns(text="review", label="sentiment")}
    forms = [*in_every_form(columns, tmp_path), str(write_csv(tmp_path / "ROWS.CSV", **columns))]
    results = [read(form, **options) for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert results[0].texts == tuple(TEXTS)
    names = ("neg", "neutral", "pos") if labels is CLASSES else None
    assert results[0].label_names == names and results[0].num_labels == 3
    assert results[0].labels is not None and results[0].labels.dtype == torch.int64
    assert results[0].labels.tolist() == ([2, 0, 0, 2, 1] if names else labels)


def test_ratings_are_the_same_from_every_source(tmp_path: Path) -> None:
    columns = {"text": TEXTS, "label": RATINGS}
    forms = [*in_every_form(columns, tmp_path), write_csv(tmp_path / "rows.csv", **columns)]
    forms += [
        {"text": TEXTS, "label": np.array(RATINGS)},
        {"text": np.array(TEXTS), "label": torch.tensor(RATINGS)},
        {"text": tuple(TEXTS), "label": (value for value in RATINGS)},
        {"text": dict.fromkeys(TEXTS).keys(), "label": dict(enumerate(RATINGS)).values()},
    ]
    results = [read(form, "rating") for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert torch.equal(results[0].labels, torch.tensor(RATINGS))
    assert results[0].num_labels is None


def test_choices_are_the_same_from_every_source(tmp_path: Path) -> None:
    columns = {"question": QUESTIONS, "choices": CHOICES, "answer": ANSWERS}
    letters = [{"text": options, "label": list("ABCD"[: len(options)])} for options in CHOICES]
    forms = in_every_form(columns, tmp_path)
    for kind in (str, int):  # a CSV reader makes 1 of "1"
        numbers = [
            {"text": options, "label": [*map(kind, range(1, len(options) + 1))]}
            for options in CHOICES
        ]
        answers = ([of(answer + 1) for answer in ANSWERS] for of in (str, int))
        forms += [{**columns, "choices": numbers, "answer": own} for own in answers]
    forms += [
        {**columns, "choices": letters},
        {**columns, "choices": letters, "answer": ["B", "D", "A"]},  # as on the hub
        {**columns, "answer": ["no", "dull", "the"]},
        {**columns, "choices": [tuple(options) for options in CHOICES]},
    ]
    results = [read(form, "choice") for form in forms]
    assert all(same(result, results[0]) for result in results)
    assert results[0].texts == tuple(QUESTIONS)
    assert results[0].labels is not None and results[0].labels.tolist() == ANSWERS


def test_texts_alone() -> None:
    bare = read(TEXTS, labelled=False)
    assert bare.labels is None
    series, column = pd.Series(TEXTS), Dataset.from_dict({"text": TEXTS})["text"]
    for texts in (column, pd.Index(TEXTS), series, series.to_numpy(), iter(TEXTS)):
        assert same(read(texts, labelled=False), bare)
    for labels in ({}, {"label": [-1] * 5}, {"label": [None] * 5}):
        assert same(read({"text": TEXTS, **labels}, labelled=False), bare)
    with pytest.warns(UserWarning, match="'label': 2 of 5 labels are missing, so none is used"):
        some = {"text": TEXTS, "label": [None, None, *CLASSES[2:]]}
        assert read(some, labelled=False).labels is None
    named = {"columns": Columns(label_names=("-1", "1"))}
    for values, how in (
        ([-1.0] * 5, {"kind": "rating"}),
        (["-1"] * 5, {}),
        ([-1] * 5, named),
        (CLASSES, {}),
    ):
        assert read({"text": TEXTS, "label": values}, labelled=False, **how).labels is not None
    pairs = read([*zip(QUESTIONS, CHOICES, strict=True)], "choice", labelled=False)
    rows = {"question": QUESTIONS, "choices": CHOICES}
    assert same(pairs, read(rows, "choice", labelled=False))
    two = Columns(pair="other")
    couples = read([("good", "bad")], "rating", columns=two, labelled=False)
    row = [{"text": "good", "other": "bad"}]
    assert same(couples, read(row, "rating", columns=two, labelled=False))


def test_class_label_features_carry_their_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"text": TEXTS[:3], "label": [1, 0, 1]}, features=features)
    for source in (table, table.to_iterable_dataset()):
        assert read(source).label_names == ("neg", "pos")
    # Another order, and one class more: mapped by name, not by index.
    turned = read(table, columns=Columns(label_names=["pos", "mixed", "neg"]))
    assert turned.labels is not None and turned.labels.tolist() == [0, 2, 0]
    assert turned.num_labels == 3
    with pytest.raises(DataError, match=r"row 0.*'pos' is not one of"):
        read(table, columns=Columns(label_names=["good", "neg"]))
    hidden = Dataset.from_dict({"text": TEXTS[:2], "label": [-1, -1]}, features=features)
    assert read(hidden, labelled=False).labels is None
    with pytest.raises(DataError, match="labelled=False"):
        read(hidden)


def test_given_names_set_the_order() -> None:
    names = ["pos", "neutral", "neg", "unseen"]
    named = read(TABLE, columns=Columns(label_names=names))
    assert named.labels is not None and named.labels.tolist() == [0, 2, 2, 0, 1]
    assert named.num_labels == 4 and named.label_names == tuple(names)
    ints = {"text": TEXTS[:2], "label": [0, 3]}
    assert read(ints, columns=Columns(label_names=names)).label_names == tuple(names)
    assert read(ints, num_labels=6).num_labels == 6


def test_examples_pass_through_if_they_fit() -> None:
    ready, bare = read(TABLE), read(TEXTS, labelled=False)
    names = Columns(label_names=["neg", "neutral", "pos"])
    assert read(ready) is ready and read(ready, columns=names) is ready
    assert read(bare, labelled=False) is bare
    numbers = read({"text": TEXTS, "label": [0, 1, 2, 1, 0]})
    assert numbers.label_names is None
    named = read(numbers, columns=names)
    assert named.label_names == ("neg", "neutral", "pos")
    assert torch.equal(named.labels, numbers.labels)


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
        return Dataset.from_dict(TABLE)

    monkeypatch.setattr(sources, "load_dataset", load)
    assert same(read(name), read(TABLE)) and calls == [called]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing.*cannot be loaded") as caught:
        read("nobody/nothing")
    assert caught.value.__cause__ is not None


def test_a_transform_is_not_dropped_in_silence() -> None:
    table = Dataset.from_dict({"text": ["w5", "w6"]})
    turned = table.with_transform(lambda batch: {"text": ["w9" for _ in batch["text"]]})
    with pytest.raises(DataError, match=r"source has a transform, .* source\.map"):
        tiny_model().encode(turned, labelled=False)


def test_of_a_stream_only_the_columns_needed_are_kept() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": text, "junk": object()} for text in TEXTS)

    features = Features({"text": Value("string"), "junk": Value("string")})
    stream = IterableDataset.from_generator(rows, features=features)
    assert same(read(stream, labelled=False), read(TEXTS, labelled=False))
    with pytest.raises(DataError, match="source is empty"):
        read(stream.filter(lambda row: False), labelled=False)


def test_rows_at_the_end_of_a_large_file_may_have_other_types_and_columns(tmp_path: Path) -> None:
    """Readers that look at the first part of a file alone fail on them."""
    path = tmp_path / "large.jsonl"
    row = json.dumps({"text": "w5 " * 300, "label": 3, "day": "2024-03-01"})
    last = json.dumps({"text": "w6", "label": 3.5, "day": "2024-03-02", "note": "new"})
    path.write_text(f"{row}\n" * 12_000 + f"{last}\n")
    assert path.stat().st_size > 10 * 2**20
    table = load(path)
    assert len(table) == 12_001 and table[-1]["label"] == 3.5 and table[0]["note"] is None
    assert table[0]["day"] == "2024-03-01"


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
    ("cells", "expected"),
    [
        ("3 3.50 -.5 +1 1e-3 0.", [3.0, 3.5, -0.5, 1.0, 0.001, 0.0]),
        ("3 -4 0", [3, -4, 0]),
        ("01 2", ["01", "2"]),
        ("12345678901234567890 1", ["12345678901234567890", "1"]),
        ("1_000 2", ["1_000", "2"]),
        ("nan 1", ["nan", "1"]),
        ("+-5 +-3", ["+-5", "+-3"]),
    ],
)
def test_what_is_a_number_in_a_csv_file(tmp_path: Path, cells: str, expected: list[Any]) -> None:
    path = write_csv(tmp_path / "cells.csv", cell=cells.split(), more=cells.split())
    found = load(path)["cell"][:]
    assert found == expected and [*map(type, found)] == [*map(type, expected)]


def test_records_are_rows_with_the_cells_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,price,'=sum\n007,1.10,\n8,2,x\n,,\n")
    expected = [
        {"id": "007", "price": "1.10", "=sum": None},
        {"id": "8", "price": "2", "=sum": "x"},
    ]
    assert records(path) == expected
    path = tmp_path / "rows.jsonl"  # with a blank line, and a column of different types
    path.write_text('{"id": 7, "day": "2024-03-01"}\n\n{"id": "x", "late": [1]}\n')
    first = {"id": 7, "day": "2024-03-01", "late": None}
    assert records(path) == [first, {"id": "x", "day": None, "late": [1]}]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_stand_between_cells(mark: str, tmp_path: Path) -> None:
    """As spreadsheets write them; where they take semicolons, numbers have decimal commas."""
    number = "3,5" if mark == ";" else "3.5"
    rows = [["text", "label", "count"], ["good, really", number, "1"], ["w5", "2", "0"]]
    file = tmp_path / "data.csv"
    file.write_text("\ufeff" + "".join(f"{mark.join(row)}\r\n" for row in rows), encoding="utf-8")
    table = load(file, ["text"])
    assert table["text"][:] == ["good, really", "w5"]
    assert table["label"][:] == [3.5, 2.0] and table["count"][:] == [1, 0]
    assert {*map(type, table["count"])} == {int}  # classes, and no ratings


def test_a_cell_that_is_no_number_is_the_only_one_refused(tmp_path: Path) -> None:
    """Between semicolons too, where the others have decimal commas."""
    file = tmp_path / "data.csv"
    file.write_text("text;label\nw5, w6;3,5\nw7;NA\nw8;-1,25\n1,5;2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 3: 'NA' is not a number") as raised:
        encode(str(file), tiny_tokenizer(), kind="rating")
    assert raised.value.rows == (1,)
    assert [row["label"] for row in records(file)] == ["3.5", "NA", "-1.25", "2"]
    assert load(file, ["text"])["text"][:] == ["w5, w6", "w7", "w8", "1,5"]
    file.write_text("text;label\n1,5;2,5\n2,5;x\n", encoding="utf-8")
    assert records(file, ["text"])[0] == {"text": "1,5", "label": "2,5"}


@pytest.mark.parametrize("end", [' "w8",bad', " w8,bad"])
def test_a_quote_that_is_not_closed_swallows_no_rows(end: str, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(f'text,label\n"w5 open,bad\nw6 w10,good\nw7{end}\nw9,good\n')
    with pytest.raises(DataError, match=r'line [45]: .* a quote \("\) is not closed'):
        load(file)
    file.write_text('text,label\n"a ""quote""\nin it",bad\nw6 5" disk,good\n')
    assert load(file)["text"][:] == ['a "quote"\nin it', 'w6 5" disk']


def test_numbers_among_names_between_semicolons_stay(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("text;label;empty\nw5;1,5;\nw6;late;\nw7;lost;\n", encoding="utf-8")
    table = load(file)
    assert table["label"][:] == ["1,5", "late", "lost"] and table["empty"][:] == [None] * 3


def test_points_among_decimal_commas_are_refused(tmp_path: Path) -> None:
    """They may be between thousands. In a column that is not used they are no matter."""
    file = tmp_path / "data.csv"
    file.write_text("text;price;label\nw5;1.234;1\nw6;999;2\nw7;12,5;3,5\n", encoding="utf-8")
    assert load(file)["price"][:] == ["1.234", "999", "12,5"]
    examples = encode(str(file), tiny_tokenizer(), kind="rating")
    assert examples.labels is not None and examples.labels.tolist() == [1.0, 2.0, 3.5]
    with pytest.raises(DataError, match="column 'price', row 4: '12,5' is not a number"):
        encode(str(file), tiny_tokenizer(), kind="rating", columns=Columns(label="price"))
    file.write_text("text;label;note\n1,5;1.5;1.5\n2.5;2.25;2,5\n3;2;no\n", encoding="utf-8")
    table = load(file, ["text"])  # neither texts nor what is not converted
    assert table["text"][:] == ["1,5", "2.5", "3"] and table["label"][:] == [1.5, 2.25, 2.0]
    assert table["note"][:] == ["1.5", "2,5", "no"]
