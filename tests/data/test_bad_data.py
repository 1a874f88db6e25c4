"""Unusable data are refused with the place, what came and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Sequence, Value
from tokenizers.normalizers import Replace
from toy_tokenizers import bert_like, gpt_like

from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.errors import ConfigError, DataError

OK = {"text": ["good", "bad"], "label": [0, 1]}
AB = Columns(label_names=["a", "b"])
PAIR = Columns(pair="b")
HOURS = Columns(extra=["hours"])
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
OBJECTS = np.empty(1, object)
OBJECTS[0] = OBJECTS


def texts(*values: Any) -> dict[str, list[Any]]:
    return {"text": list(values), "label": [k % 2 for k in range(len(values))]}


def labels(*values: Any, **more: Any) -> dict[str, list[Any]]:
    return {"text": ["good"] * len(values), "label": list(values), **more}


def hub(values: list[Any], several: bool = False) -> Dataset:
    label = ClassLabel(names=["a", "b"])
    features = Features({"text": Value("string"), "label": Sequence(label) if several else label})
    return Dataset.from_dict(labels(*values), features=features)


def streamed(*rows: Any) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def quiz(choices: Any, answer: Any = 0) -> dict[str, list[Any]]:
    return {
        "question": ["why", "why not"],
        "choices": [["yes", "no"], choices],
        "answer": [0 if not isinstance(answer, str) else "yes", answer],
    }


def asked(names: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"question": "a", "choices": {"text": ["b", "c"], "label": names}, "answer": answer}]


Case = tuple[Any, dict[str, Any], str]
SOURCES: list[Case] = [
    (source, {}, message)
    for source, message in (
        ([], "empty"),
        ({"text": [], "label": []}, "empty"),
        (Dataset.from_dict({"text": [], "label": []}), "empty"),
        (
            {"words": ["a"], "label": [1]},
            "column 'text' is missing; columns there: 'words', 'label'",
        ),
        ({"text": ["good"]}, "column 'label' is missing; columns there: 'text'"),
        (["good", "bad"], "column 'label' is missing"),
        (Dataset.from_dict({"text": ["good"]}), "column 'label' is missing"),
        (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "column 'label' is missing"),
        ({"text": ["good", "bad"], "label": [1]}, "differ in length: 'text' 2, 'label' 1"),
        ({"text": ["good"], "label": 1}, "column 'label' is a int"),
        ({"text": "good", "label": [1]}, "column 'text' is a str.*in the order of the rows"),
        ({"text": b"good", "label": [1]}, "column 'text' is a bytes"),
        ({"text": {"good"}, "label": [0]}, "column 'text' is a set"),
        ({"text": np.array("good"), "label": [0]}, "column 'text' is a ndarray"),
        (pd.DataFrame([["a", "b", 0]], columns=["text", "text", "label"]), "'text' is there twice"),
        (DatasetDict(train=Dataset.from_dict(OK)), "splits: 'train'"),
        (7, "source is a int; expected a datasets.Dataset"),
        ((["w5", "w6"], [0, 1]), "source is a pair; expected {'text': texts, 'label': labels}"),
        ("this is a text to predict", "a single text goes in a list"),
        ("w5 w6 " * 60, "a single text goes in a list"),
        ("a\0b", "a single text goes in a list"),
        ("w" * 300 + ".csv", "a single text goes in a list"),
        ("nowhere.csv", "no such file"),
        ("reviews.cvs", r"'reviews\.cvs' is neither a file nor the name of"),
        (Path("data.parquet"), "data.parquet: no such file"),
        ([{"text": "good", "label": 1}, "bad"], "row 1: a str .*expected a dict"),
        (["good", {"text": "bad"}], "row 1: a dict .*expected a text"),
        (texts("good", "", " \n\t"), r"'text', row 1: the text is empty.* \(and 1 more: row 2\)"),
        (texts("good", None), "column 'text', row 1: the text is missing"),
        (texts(1, 2), "column 'text', row 0: 1 is a int; expected a str"),
        (texts("good", 2), "column 'text', row 1: 2: a int, where other rows have a str"),
        (texts("good", "cut \ud83d"), "column 'text', row 1: .*: not valid Unicode"),
        (
            streamed({"text": "good", "label": 0}, {"text": "bad", "label": "x"}),
            "row 1: 'x': a str, where other rows have a int",
        ),
        (streamed({"text": "good"}, {"text": "bad", "label": 1}), "row 0: the label is missing"),
        (streamed({"text": "good", "label": 0}, "bad"), "row 1: a str .*expected a dict"),
    )
]
# Arrow went round in these until the process ended.
SOURCES += [
    (made(labels(*cells)), {}, rf"column 'label', row {row}: .* contains itself")
    for cell in (ENDLESS, OBJECTS)
    for row, cells in ((0, [cell, cell]), (1, [1, cell]))
    for made in (dict, pd.DataFrame)
]
SOURCES += [
    (labels(gap, "a"), {}, "'label', row 0: the label is missing")
    for gap in (None, pd.NA, np.nan, float("nan"))
]
CLASSES: list[Case] = [
    (labels(0, 1, None), {}, "column 'label', row 2: the label is missing"),
    (labels(0.0, float("nan")), {}, "row 1: the label is missing"),
    (hub([0, None]), {}, "row 1: the label is missing"),
    (labels(0, 1, 2), {"num_labels": 2}, "row 2: label 2; expected 0 to 1"),
    (labels(0, 1, 2), {"columns": AB}, "row 2: label 2; expected 0 to 1"),
    (labels(0, -2), {}, "row 1: label -2; expected 0 or more"),
    (labels(0, -1), {}, "row 1: label -1.*labelled=False"),
    (labels(0, 1.5), {}, "row 1: 1.5 is a float; expected an integer or a str"),
    (labels("a", 1), {}, "column 'label', row 1: 1: a int, where other rows have a str"),
    (labels("a", "c"), {"columns": AB}, "row 1: 'c' is not one of"),
    (labels("a", "b"), {"num_labels": 3}, "num_labels=3, but .* 2 classes"),
    (labels("a", " "), {}, "row 1: the label is empty"),
    (OK, {"num_labels": 3, "columns": AB}, "num_labels=3, but there are 2"),
    (OK, {"columns": Columns(max_length=2)}, "max_length=2"),
    (OK, {"columns": PAIR}, "column 'b' is missing"),
    (["a"], {"columns": PAIR, "labelled": False}, "row 0: a str .*a pair"),
    ([("a", "b", "c")], {"columns": PAIR, "labelled": False}, "row 0: 3 entries"),
    (OK, {"kind": "rating", "num_labels": 2}, "for kind='class'"),
]
RATINGS: list[Case] = [
    (source, {"kind": "rating", **options}, message)
    for source, options, message in (
        (labels(1.0, float("nan")), {}, "row 1: nan is not finite"),
        (labels(float("inf"), 2.0), {}, "row 0: inf is not finite"),
        (labels(1.0, 1e39), {}, "row 1: 1e\\+39 is too large"),
        (labels("1.0", "2,0", "nan"), {}, "row 1: '2,0' is not a number; expected a rating"),
        (labels(True, False), {}, "row 0: True is a bool"),
        (labels(1.0, None), {}, "row 1: the label is missing"),
        (labels(1.0), {"columns": HOURS}, "column 'hours' is missing"),
        (
            labels(1.0, 2.0, hours=[1, None]),
            {"columns": HOURS},
            "column 'hours', row 1: the number is missing",
        ),
        (
            labels(1.0, 2.0, hours=["1", "x"]),
            {"columns": HOURS},
            "'hours', row 1: 'x' is not a number; expected a number",
        ),
    )
]
QUIZZES: list[Case] = [
    (source, {"kind": "choice"}, message)
    for source, message in (
        (quiz(["yes"]), "column 'choices', row 1: 1 choices; expected 2 to 8"),
        (quiz(["yes"] * 9), "row 1: 9 choices"),
        (quiz(["yes", " "]), "column 'choices', row 1: choice 1: the text is empty"),
        (quiz(["yes", "no"], 2), "column 'answer', row 1: answer 2; expected 0 to 1"),
        (quiz(["yes", "no"], -1), "row 1: answer -1"),
        (quiz(["yes", "no"], "maybe"), "row 1: 'maybe' matches 0"),
        (quiz(["yes", "yes"], "yes"), "row 1: 'yes' matches 2"),
        (quiz(["yes", "no"], None), "row 1: the label is missing"),
        (quiz(["yes", 3]), "column 'choices': mixed"),
        (quiz("yes"), "column 'choices', row 1.*: a str, where other rows have a list"),
        ({"question": ["a"], "choices": ["c"], "answer": [0]}, "row 0: 'c' is not a list"),
        (asked(["A"], "A"), "row 0: 2 texts but 1 labels"),
        (asked(2, 1), "row 0: a int; expected a list of str"),
        (asked(["1", "2"], 0), r"row 0: 0 matches 0 of the choices \['1', '2'\]"),
        (["why", "why not"], "row 0: a str .*a pair"),
    )
]
QUIZZES += [
    (OK, {"kind": "choice", "columns": Columns(pair="x")}, r"columns.pair='x'"),
]
SEVERAL: list[Case] = [
    (source, {"kind": "labels", **options}, message)
    for source, options, message in (
        (labels(["a", "b"], "c", ["a"]), {}, "column 'label'"),
        (labels(["a", "b"], None, ["a"]), {}, "row 1: the label is missing"),
        (labels(["a"], ["b"], ["z"]), {"columns": AB}, "row 2: 'z' is not"),
        (labels(["a"], ["b"], []), {"num_labels": 3}, r"has 2 classes: \('a', 'b'\)"),
        (labels(["a"], ["a"], []), {"num_labels": 2}, r"has 1 classes: \('a',\)"),
        (
            labels(["a"], ["b"]),
            {"new_names": False},
            "has names, and the labels",
        ),
        (labels(["0", "1"]), {"new_names": False}, "has names, and the labels"),
        (labels([1, 0], [1]), {}, r"row 1: \[1\]; expected a list of names of labels, or 2"),
        (labels([1, 0], [2, 0]), {}, r"row 1: \[2, 0\]"),
        (labels([1, 0]), {"num_labels": 3}, "row 0: .* or 3 numbers 0 or 1"),
        (labels("['a']", "[]"), {}, "row 0: .* is not a list; expected JSON"),
        (labels("[" * 10**5, "[]"), {}, "row 0: .* is not a list; expected JSON"),
        (labels(["a"], ["b"], ["a", None]), {}, "row 2: the label is missing"),
        (labels(["a"], [" "], []), {}, "row 1: the label is empty"),
        (labels([], []), {}, r"row 0: \[\]; expected a number 0 or 1 for each label, or names"),
        (labels([], [1, 0]), {}, r"row 0: \[\]; expected a number 0 or 1"),
        (hub([[0], [1, -1]], several=True), {}, "row 1: label -1; expected 0 to 1"),
        (hub([[0], [1, None]], several=True), {}, "row 1: the label is missing"),
    )
]


@pytest.mark.parametrize(
    ("source", "options", "message"), [*SOURCES, *CLASSES, *RATINGS, *QUIZZES, *SEVERAL]
)
def test_what_is_wrong_and_where(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        encode(source, bert_like(), **{"kind": "class", **options})
    assert len(str(error.value)) < 1000


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "empty.jsonl' is empty"),
    "nothing.csv": ("", "nothing.csv.*the file is empty"),
    "header.csv": ("text,label\n", "header.csv' is empty"),
    "mixed.csv": ("text;label\ngood,0\n", "mixed.csv.*the label is missing"),
    "longer.csv": ("text\tlabel\ngood\tvery\t0\n", "more cells than the header has names"),
    "ragged.csv": ("text,label\ngood,0\nbad,so,1\n", "ragged.csv.*expected commas.*line 3"),
    "open.csv": ('text,label\n"good,0\n', "open.csv.*quotes around a cell"),
    "gap.csv": (
        "text,label\ngood,0\nbad,\nfilm,1\nso,\n",
        r"^gap.csv, column 'label', row 3: the label is missing .* \(and 1 more: row 5\)$",
    ),
    "line.csv": ("\ntext,label\ngood,0\n", "line.csv.*the first line is empty; expected the names"),
    "formulas.csv": ("text,'=a,=a\nbad,0,1\n", "column '=a' is there twice"),
    "twice.csv": ("text,label,text\nbad,0,good\n", "column 'text' is there twice"),
    "nul.csv": ("te\0xt,label\ngood,0\n", "the header has a NUL character"),
    "blank.csv": ('text,label\ngood,0\n"",1\n', "blank.csv, column 'text', row 3: the text is"),
    "broken.jsonl": ('{"text": "good", "la\n', "broken.jsonl.*line 1 is not JSON"),
    "twice.jsonl": ('{"text": "bad", "text": "good", "label": 0}', "'text' is there twice"),
    "deep.jsonl": ('{"a":' * 100_000, "cannot be read"),
    "number.jsonl": (lines(OK, 7), "line 2: a int .7.; expected an obj"),
    "list.json": (
        "\n[" + lines({"text": "good", "label": 0}) + "]",
        r"list.json.*line 2 begins a list; expected an object a line.*in Python, pandas\.read_json",
    ),
    "mixed.jsonl": (
        lines(*({"text": "a", "label": v} for v in (0, 1, "x"))),
        "mixed.jsonl, column 'label', line 3: 'x': a str, where other rows have a int",
    ),
    "first.jsonl": (
        lines(*({"text": "a", "label": v} for v in ("x", 0, 1))),
        "first.jsonl, column 'label', line 1: 'x': a str, where other rows have a int",
    ),
    "lines.jsonl": (
        lines({"text": "good", "label": 0}) + "\n" + lines({"text": " ", "label": 1}),
        "lines.jsonl, column 'text', line 3: the text is empty",
    ),
    "latin.csv": ("text,label\ncaf\xe9,0\n", "latin.*utf-8.*decode byte 0xe9"),
    "latin.jsonl": ('{"text": "caf\xe9"}', "latin.*utf-8.*decode byte 0xe9"),
    "rows.txt": ("good", r"rows.txt'?: expected a .csv, .json or .jsonl file; .* a list of its"),
    "rows.csv.gz": ("", r"rows.csv.gz'?: expected a .csv, .*unpack it"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        encode(str(tmp_path / name), bert_like(), kind="class")


def without_x() -> Any:
    tokenizer = gpt_like()
    tokenizer.backend_tokenizer.normalizer = Replace("x", "")
    return tokenizer


def test_a_text_without_tokens() -> None:
    with pytest.raises(DataError, match="row 1: the tokenizer finds no token in 'xx'"):
        encode(["good", "xx"], without_x(), kind="class", labelled=False)


@pytest.mark.parametrize(
    ("source", "first", "then", "message"),
    [
        (OK, {}, {"kind": "rating"}, "kind='class'; expected 'rating'"),
        (OK, {}, {"tokenizer": gpt_like()}, "another tokenizer"),
        (
            OK,
            {"labelled": False},
            {"columns": HOURS},
            "without the column 'hours'; encode it again",
        ),
        (OK["text"], {"labelled": False}, {}, "without labels"),
        (labels("b", "a"), {}, {"columns": Columns(label_names=["b", "a"])}, "has the classes"),
        (labels("a", "b"), {}, {"new_names": False}, "expected classes without names"),
        (labels(0, 4), {}, {"num_labels": 3}, "has 5 classes; expected 3"),
        (
            labels([1, 0], [0, 1]),
            {"kind": "labels"},
            {"kind": "labels", "num_labels": 3},
            "source has 2 labels; expected 3",
        ),
        (
            texts("a the good", "bad"),
            {},
            {"columns": Columns(max_length=4)},
            "texts of 5 tokens; max_length=4",
        ),
    ],
)
def test_examples_that_were_encoded_otherwise(
    source: Any, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    examples = encode(source, bert_like(), **{"kind": "class", **first})
    with pytest.raises(DataError, match=message):
        encode(examples, **{"tokenizer": bert_like(), "kind": "class", **then})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "label"}, "must be different columns"),
        ({"pair": "text"}, "must be different columns"),
        ({"question": "answer"}, "must be different columns"),
        ({"extra": ["label"]}, "'label' must be different columns"),
        ({"extra": "hours"}, "extra="),
        ({"label_names": ["a"]}, "two or more"),
        ({"label_names": ["a", "a"]}, "different names"),
        ({"label_names": np.array("ab")}, "label_names="),
    ],
)
def test_columns(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Columns(**fields)
