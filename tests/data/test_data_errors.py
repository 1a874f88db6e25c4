"""Unusable data is refused with the place, what came and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from tokenizers.normalizers import Replace
from toy_tokenizers import bert_like, gpt_like

from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.errors import ConfigError, DataError

OK = {"text": ["good", "bad"], "label": [0, 1]}


def texts(*values: Any) -> dict[str, list[Any]]:
    return {"text": list(values), "label": [k % 2 for k in range(len(values))]}


def labels(*values: Any) -> dict[str, list[Any]]:
    return {"text": ["good"] * len(values), "label": list(values)}


def streamed(*rows: Any) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def quiz(choices: Any, answer: Any = 0) -> dict[str, list[Any]]:
    return {
        "question": ["why", "why not"],
        "choices": [["yes", "no"], choices],
        "answer": [0 if not isinstance(answer, str) else "yes", answer],
    }


SOURCES: list[tuple[Any, str]] = [
    ([], "empty"),
    ({"text": [], "label": []}, "empty"),
    (Dataset.from_dict({"text": [], "label": []}), "empty"),
    (
        {"words": ["good"], "label": [1]},
        "column 'text' is missing; columns there: 'words', 'label'",
    ),
    ({"text": ["good"]}, "column 'label' is missing; columns there: 'text'"),
    (["good", "bad"], "column 'label' is missing"),
    (Dataset.from_dict({"text": ["good"]}), "column 'label' is missing"),
    ({"text": ["good", "bad"], "label": [1]}, "differ in length: 'text' 2, 'label' 1"),
    ({"text": "good", "label": [1]}, "column 'text' is a str"),
    ({"text": ["good"], "label": 1}, "column 'label' is a int"),
    *(
        ({"text": column, "label": [0]}, "column 'text' is a .*in the order of the rows")
        for column in ({"good"}, frozenset(["good"]), numpy.array("good"), b"good")
    ),
    (
        pandas.DataFrame([["good", "bad", 0]], columns=["text", "text", "label"]),
        "column 'text' is there twice",
    ),
    (DatasetDict(train=Dataset.from_dict(OK)), "splits: 'train'"),
    (7, "source is a int; expected a datasets.Dataset"),
    ("this is a text to predict", "a single text goes in a list"),
    *(
        (text, "a single text goes in a list")
        for text in ("w5 w6 " * 60, "w" * 300, "a\0b", "w" * 300 + ".csv")
    ),
    ("nowhere.csv", "no such file"),
    (Path("data.parquet"), "data.parquet: no such file"),
    ([{"text": "good", "label": 1}, "bad"], "row 1: a str .*expected a dict"),
    (["good", {"text": "bad"}], "row 1: a dict .*expected a text"),
    (texts("good", ""), "column 'text', row 1: the text is empty"),
    (texts("good", "bad", " \n\t"), "column 'text', row 2: the text is empty"),
    (texts("good", None), "column 'text', row 1: the text is missing"),
    (texts(1, 2), "column 'text', row 0: 1 is a int; expected a str"),
    (texts("good", 2), "column 'text', row 1: 2: a int, where the first row has a str"),
    (texts("good", "cut \ud83d"), "column 'text', row 1: .*: not valid Unicode"),
    (
        streamed({"text": "good", "label": 0}, {"text": "bad", "label": "x"}),
        "row 1: 'x': a str, where the first row has a int",
    ),
    (streamed({"text": "good"}, {"text": "bad", "label": 1}), "row 0: the label is missing"),
    (streamed({"text": "good", "label": 0}, "bad"), "row 1: a str .*expected a dict"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES)
def test_sources(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        encode(source, bert_like(), kind="class")
    assert len(str(error.value)) < 1000


def test_views_of_a_dict_are_in_its_order() -> None:
    rows = {"good": 0, "bad": 1, "film": 0}
    read = encode({"text": rows.keys(), "label": rows.values()}, bert_like(), kind="class")
    assert read.texts == tuple(rows)


CLASSES: list[tuple[Any, dict[str, Any], str]] = [
    (labels(0, 1, None), {}, "column 'label', row 2: the label is missing"),
    (labels(None, 1.0, 0.0), {}, "column 'label', row 0: the label is missing"),
    (labels(0, 1, 2), {"num_labels": 2}, "row 2: label 2; expected 0 to 1"),
    (
        labels(0, 1, 2),
        {"columns": Columns(label_names=["a", "b"])},
        "row 2: label 2; expected 0 to 1",
    ),
    (labels(0, -2), {}, "row 1: label -2; expected 0 or more"),
    (labels(0, -1), {}, "row 1: label -1.*labelled=False"),
    (labels(0, -1), {"labelled": False}, "row 1: label -1"),
    (labels(0, 1.5), {}, "row 1: 1.5 is a float; expected an integer or a str"),
    (labels(0.0, float("nan")), {}, "row 1: the label is missing"),
    (
        Dataset.from_dict(labels(0, None)).cast_column("label", ClassLabel(names=["a", "b"])),
        {},
        "row 1: the label is missing",
    ),
    (labels("a", 1), {}, "column 'label', row 1: 1: a int, where the first row has a str"),
    (labels("a", "c"), {"columns": Columns(label_names=["a", "b"])}, "row 1: 'c' is not one of"),
    (labels("a", "b"), {"num_labels": 3}, "num_labels=3, but .* 2 classes"),
    (labels("a", " "), {}, "row 1: the label is empty"),
    (OK, {"num_labels": 1}, "num_labels=1"),
    (OK, {"num_labels": 2.0}, "num_labels=2.0"),
    (
        OK,
        {"num_labels": 3, "columns": Columns(label_names=["a", "b"])},
        "num_labels=3, but there are 2",
    ),
    (OK, {"columns": Columns(max_length=2)}, "max_length=2 must be an integer of at least 3"),
    (OK, {"columns": Columns(pair="other")}, "column 'other' is missing"),
    (["a"], {"columns": Columns(pair="b"), "labelled": False}, "row 0: a str .*a pair"),
    ([("a", "b", "c")], {"columns": Columns(pair="b"), "labelled": False}, "row 0: 3 entries"),
]


@pytest.mark.parametrize(("source", "options", "message"), CLASSES)
def test_classes(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(source, bert_like(), kind="class", **options)


RATINGS: list[tuple[Any, str]] = [
    (labels(1.0, float("nan")), "row 1: nan is not finite"),
    (labels(float("inf"), 2.0), "row 0: inf is not finite"),
    (labels(1.0, 1e39), "row 1: 1e\\+39 is too large"),
    (labels("1.0", "2.0"), "row 0: '1.0' is a str; expected a real number"),
    (labels("1.0", "2,0", "nan"), "row 1: '2,0' is not a number; expected a rating"),
    (labels(True, False), "row 0: True is a bool"),
    (labels(1.0, None), "row 1: the label is missing"),
]


@pytest.mark.parametrize(("source", "message"), RATINGS)
def test_ratings(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(source, bert_like(), kind="rating")


QUIZZES: list[tuple[Any, str]] = [
    (quiz(["yes"]), "column 'choices', row 1: 1 choices; expected 2 to 8"),
    (quiz(["yes"] * 9), "row 1: 9 choices"),
    (quiz(["yes", " "]), "column 'choices', row 1: choice 1: the text is empty"),
    (quiz(["yes", "no"], 2), "column 'answer', row 1: answer 2; expected 0 to 1"),
    (quiz(["yes", "no"], -1), "row 1: answer -1"),
    (quiz(["yes", "no"], "maybe"), "row 1: 'maybe' matches 0"),
    (quiz(["yes", "yes"], "yes"), "row 1: 'yes' matches 2"),
    (quiz(["yes", "no"], None), "row 1: the label is missing"),
    (quiz(["yes", 3]), "column 'choices': mixed"),
    (quiz("yes"), "column 'choices', row 1.*: a str, where the first row has a list"),
    (
        {**OK, "question": ["a", "b"], "choices": ["c", "d"], "answer": [0, 0]},
        "row 0: 'c' is not a list",
    ),
    (
        [{"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "answer": "A"}],
        "row 0: 2 texts but 1 labels",
    ),
    (
        [{"question": "a", "choices": {"text": ["b", "c"], "label": 2}, "answer": 1}],
        "row 0: a int; expected a list of str",
    ),
    (
        [{"question": "a", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answer": 0}],
        r"row 0: 0 matches 0 of the choices \['1', '2'\]",
    ),
    (["why", "why not"], "row 0: a str .*a pair"),
]


@pytest.mark.parametrize(("source", "message"), QUIZZES)
def test_choices(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(source, bert_like(), kind="choice")


def test_options_that_do_not_go_with_the_kind() -> None:
    with pytest.raises(DataError, match="kind='regression'"):
        encode(OK, bert_like(), kind="regression")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="for kind='class'"):
        encode(OK, bert_like(), kind="rating", num_labels=2)
    with pytest.raises(DataError, match=r"columns.pair='x'"):
        encode(quiz(["a", "b"]), bert_like(), kind="choice", columns=Columns(pair="x"))


def test_a_text_without_tokens() -> None:
    tokenizer = gpt_like()
    tokenizer.backend_tokenizer.normalizer = Replace("x", "")
    with pytest.raises(DataError, match="row 1: the tokenizer finds no token in 'xx'"):
        encode(texts("good", "xx"), tokenizer, kind="class")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    contents = {
        "empty.jsonl": ("", "empty.jsonl.*the file is empty"),
        "header.csv": ("text,label\n", "header.csv' is empty"),
        "german.csv": (
            "text;label\ngood, very;0\n",
            "german.csv.*more cells than the header has names; expected commas",
        ),
        "tabs.csv": ("text\tlabel\ngood\t0\n", "columns there: 'text.tlabel'"),
        "wide.csv": ("text,label\na,good,0\nb,bad,1\n", "more cells than the header has names"),
        "ragged.csv": ("text,label\ngood,0\nbad,so,1\n", "ragged.csv.*expected commas.*line 3"),
        "open.csv": ('text,label\n"good,0\n', "open.csv.*quotes around a cell"),
        "nothing.csv": ("", "nothing.csv.*the file is empty"),
        "broken.jsonl": ('{"text": "good", "la\n', "broken.jsonl.*line 1 is not JSON"),
        "mixed.jsonl": (
            "".join(json.dumps({"text": "a", "label": v}) + "\n" for v in (0, 1, "x")),
            "mixed.jsonl, column 'label', line 3: 'x': a str, where the first row has a int",
        ),
        "gap.csv": (
            "text,label\ngood,0\nbad,\nfilm,1\nso,\n",
            r"^gap.csv, column 'label', row 3: the label is missing .* \(and 1 more: row 5\)$",
        ),
        "twice.csv": ("text,label,text\nbad,0,good\n", "column 'text' is there twice"),
        "twice.jsonl": (
            '{"text": "bad", "text": "good", "label": 0}',
            "cannot be read: column 'text' is there twice",
        ),
        "deep.jsonl": ("[" * 100_000, "cannot be read"),
        "nul.csv": ("te\0xt,label\ngood,0\n", "the header has a NUL character"),
        "blank.csv": (
            'text,label\ngood,0\n"",1\n',
            "blank.csv, column 'text', row 3: the text is missing",
        ),
        "list.json": (
            '\n[{"text": "good", "label": 0},\n{"text": " ", "label": 1}]',
            r"list.json.*line 2 begins a list; expected an object a line, as pandas\.read_json",
        ),
        "lines.jsonl": (
            '{"text": "good", "label": 0}\n\n{"text": " ", "label": 1}\n',
            "lines.jsonl, column 'text', line 3: the text is empty",
        ),
        "number.jsonl": (
            '{"text": "good", "label": 0}\n\n7\n',
            "line 3: a int .7.; expected an obj",
        ),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            encode(tmp_path / name, bert_like(), kind="class")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files_in_another_encoding(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.*utf-8.*decode byte 0xe9"):
        encode(path, bert_like(), kind="class")


def test_examples_that_do_not_fit() -> None:
    ready = encode(OK, bert_like(), kind="class")
    bare = encode(OK["text"], bert_like(), kind="class", labelled=False)
    named = encode(labels("a", "b"), bert_like(), kind="class")
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (ready, bert_like(), {"kind": "rating"}, "kind='class'; expected 'rating'"),
        (ready, gpt_like(), {"kind": "class"}, "another tokenizer"),
        (bare, bert_like(), {"kind": "class"}, "without labels"),
        (
            named,
            bert_like(),
            {"kind": "class", "columns": Columns(label_names=["b", "a"])},
            "has the classes",
        ),
        (
            encode(labels(0, 4), bert_like(), kind="class"),
            bert_like(),
            {"kind": "class", "num_labels": 3},
            "has 5 classes; expected 3",
        ),
        (
            encode(texts("a the good", "bad"), bert_like(), kind="class"),
            bert_like(),
            {"kind": "class", "columns": Columns(max_length=4)},
            "texts of 5 tokens; max_length=4",
        ),
    ]
    for source, tokenizer, options, message in cases:
        with pytest.raises(DataError, match=message):
            encode(source, tokenizer, **options)


def test_what_is_there_is_no_name_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "reviews.txt").write_text("good")
    with pytest.raises(DataError, match=r"reviews.txt'?: expected a .csv, .json or .jsonl file"):
        encode(str(tmp_path / "reviews.txt"), bert_like(), kind="class")
    with pytest.raises(DataError, match=r"'reviews\.cvs' is neither a file nor the name of"):
        encode("reviews.cvs", bert_like(), kind="class")


def test_columns_are_different_ones() -> None:
    for given in ({"text": "label"}, {"pair": "text"}, {"question": "answer"}):
        with pytest.raises(ConfigError, match="must be different columns"):
            Columns(**given)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "two or more"),
        (["a", "a"], "different names"),
        ("ab", "expected a sequence of str"),
        (numpy.array("ab"), "expected a sequence of str"),
    ],
)
def test_label_names(names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Columns(label_names=names)
