"""The same rows through every door are the same table; and what is refused, with the place."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Sequence, Value
from program import write_csv, write_lines
from tokenizers.normalizers import Replace
from toy_tokenizers import bert_like, gpt_like

from bhpeft_pyro.data import Columns, Examples, encode, table
from bhpeft_pyro.data.table import write
from bhpeft_pyro.errors import BHPEFTWarning, ConfigError, DataError
from bhpeft_pyro.testing import tiny_model, tiny_tokenizer

TEXTS = ["good film", "NA", "=a very bad, bad plot", 'not "so" dull\n', "null", "café"]
LABELS = ["pos", "neg", None, "pos", "3.0", "007"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
COLUMNS = {"text": TEXTS, "label": LABELS}


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def cells(rows: pd.DataFrame) -> dict[Any, list[Any]]:
    assert all(str(dtype) == "object" for dtype in rows.dtypes)
    return rows.to_dict("list")


def in_memory() -> dict[str, Any]:
    data = Dataset.from_dict(COLUMNS)
    return {
        "columns": COLUMNS,
        "generators": {name: (cell for cell in of) for name, of in COLUMNS.items()},
        "arrays": {name: np.array(of, object) for name, of in COLUMNS.items()},
        "rows": ROWS,
        "tuple": tuple(ROWS),
        "iterator": iter(ROWS),
        "data set": data,
        "format": data.with_format("torch"),
        "stream": data.to_iterable_dataset(),
        "mapped": data.to_iterable_dataset().map(lambda row: row),  # its columns are not known
        "frame": pd.DataFrame(COLUMNS, index=[f"row {i}" for i in range(len(TEXTS))]),
        "category": pd.DataFrame(COLUMNS).astype({"label": "category"}),
    }


@pytest.mark.parametrize("name", in_memory())
def test_rows_in_memory(name: str) -> None:
    rows = table(in_memory()[name])
    assert cells(rows) == COLUMNS and rows.index.tolist() == [*range(len(TEXTS))]
    assert rows.attrs["file"] == "" and table(rows) is rows
    part = rows.iloc[[3, 1]]
    assert table(part).index.tolist() == [3, 1]  # numbered as before
    twice = table(pd.concat([rows, rows]))
    assert twice.index.tolist() == [*range(2 * len(rows))]


def write_file(path: Path) -> None:
    frame = pd.DataFrame(COLUMNS, dtype=object)
    match path.suffix:
        case ".parquet":
            frame.to_parquet(path)
        case ".xlsx" | ".ods":
            pytest.importorskip({".xlsx": "openpyxl", ".ods": "odf"}[path.suffix])
            frame.replace({"=a": "'=a"}, regex=True).to_excel(
                path, index=False, engine={".xlsx": "openpyxl", ".ods": "odf"}[path.suffix]
            )
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".json":
            path.write_text(json.dumps(ROWS))
        case _:
            write(path, frame)


@pytest.mark.parametrize(
    ("name", "unit", "first"),
    [
        ("ROWS[1].CSV", "row", 2),  # no pattern of names
        ("rows.csv", "row", 2),
        ("rows.tsv", "row", 2),
        ("rows.jsonl", "line", 1),
        ("rows.json", "entry", 0),
        ("rows.parquet", "row", 0),
        ("rows.xlsx", "row", 2),
        ("rows.ods", "row", 2),
    ],
)
def test_files(name: str, unit: str, first: int, tmp_path: Path) -> None:
    write_file(tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        rows = table(path)
        assert cells(rows) == COLUMNS
        assert rows.index.tolist() == [*range(first, first + len(rows))]
        assert rows.attrs["file"] == name and rows.attrs["unit"] == unit


HOSTILE = ["", "=", "'", '"', ",", ";", "\n", "\r", "\r\n", "\t", "a", "\0", "é", "😀", "-1", " "]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_was_written_is_read_back(suffix: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)

    def cell() -> str | None:
        return "".join(chance.choices(HOSTILE, k=chance.randrange(6))) or None

    names = ["text", "=sum", "a,b", "'c"]
    rows = [{name: cell() for name in names} | {"id": f"{i}"} for i in range(20)]
    frame = pd.DataFrame(rows, dtype=object)
    write(tmp_path / f"rows{suffix}", frame)
    assert cells(table(tmp_path / f"rows{suffix}")) == cells(frame)
    alone = pd.concat([frame[["text"]], pd.DataFrame({"text": ["the end"]}, dtype=object)])
    write(tmp_path / f"alone{suffix}", alone)
    assert cells(table(tmp_path / f"alone{suffix}")) == cells(alone)


def test_other_cells_are_written_as_json(tmp_path: Path) -> None:
    day = pd.Timestamp("2024-03-01")
    frame = pd.DataFrame({"a": [[1, "x"]], "b": [day], "c": [math.nan]}, dtype=object)
    write(tmp_path / "a.csv", frame)
    assert cells(table(tmp_path / "a.csv")) == {"a": ['[1, "x"]'], "b": [str(day)], "c": [None]}
    write(tmp_path / "a.jsonl", frame)
    assert cells(table(tmp_path / "a.jsonl")) == {"a": [[1, "x"]], "b": [str(day)], "c": [None]}


def test_cells_of_a_csv_file_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,text,,more\n0001,null,x\n\n1.10,,nan,True\n , ,\n,,,\n")
    assert cells(table(path)) == {
        "id": ["0001", None, "1.10"],
        "text": ["null", None, None],
        "Unnamed: 2": ["x", None, "nan"],
        "more": [None, None, "True"],
    }


def test_cells_of_json_lines_may_be_of_any_type(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 7, "day": "2024-03-01"}\r\n\n{"id": "x", "late": [1], "n": NaN}\n')
    rows = table(path)
    assert rows.index.tolist() == [1, 3]
    assert cells(rows) == {
        "id": [7, "x"],
        "day": ["2024-03-01", None],
        "late": [None, [1]],
        "n": [None, None],
    }


@pytest.mark.parametrize(
    "text",
    ["text;n;m\na, b;3,5;x\n", "\ufefftext\tn\tm\na, b\t3.5\tx", "sep=|\r\ntext|n|m\r\na, b|3.5|x"],
)
def test_other_signs_between_cells(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8", newline="")
    rows = table(tmp_path / "rows.csv")
    assert cells(rows) == {"text": ["a, b"], "n": ["3.5"], "m": ["x"]}
    assert rows.index.tolist() == [2]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["3,5", "NA", "-1,25", "2"], ["3.5", "NA", "-1.25", "2"]),  # most are numbers
        (["1,5", "late", "lost"], ["1,5", "late", "lost"]),
        (["1.234", "999", "12,5"], ["1.234", "999", "12,5"]),  # points may be between thousands
        (["", "", "1,5"], [None, None, "1.5"]),
    ],
)
def test_decimal_commas_between_semicolons(
    column: list[str], expected: list[Any], tmp_path: Path
) -> None:
    lines = "".join(f"1,5;{cell}\n" for cell in column)
    (tmp_path / "rows.csv").write_text(f"text;n\n{lines}")
    rows = table(tmp_path / "rows.csv")
    assert cells(rows) == {"text": ["1,5"] * len(column), "n": expected}


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_encodings(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "text\ncafé €\n" if name == "rows.csv" else '{"text": "café €"}\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert cells(table(path)) == {"text": ["café €"]}
    path.write_text(text, encoding="cp1252")
    said = f"{name} is not UTF-8; read as Windows-1252; --encoding says otherwise"
    with pytest.warns(BHPEFTWarning, match=said):
        assert cells(table(path)) == {"text": ["café €"]}
    path.write_text(text, encoding="iso8859-15")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cells(table(path, encoding="iso8859-15")) == {"text": ["café €"]}
    for encoding in ("utf-8", "no such"):
        with pytest.raises(DataError, match="--encoding"):
            table(path, encoding=encoding)


def test_a_large_file_whose_last_row_is_of_other_types(tmp_path: Path) -> None:
    """Readers that look at the first part of a file alone fail on it."""
    row, last = {"text": "w5 " * 300, "label": 3}, {"text": "w6", "label": 3.5, "note": "new"}
    path = write_lines(tmp_path / "large.jsonl", [row] * 12_000 + [last])
    rows = table(path)
    assert path.stat().st_size > 10 * 2**20
    assert rows.iloc[-1].to_dict() == last and rows["note"].iloc[0] is None


def test_classes_of_a_data_set_come_by_name(tmp_path: Path) -> None:
    label = ClassLabel(names=["neg", "pos"])
    features = Features({"text": Value("string"), "label": label, "many": Sequence(label)})
    values = {"text": ["a", "b", "c"], "label": [1, -1, None], "many": [[1, 0], [], None]}
    data = Dataset.from_dict(values, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    for source in (data, data.to_iterable_dataset(), tmp_path / "rows.parquet"):
        rows = table(source)
        assert rows["label"].tolist() == ["pos", None, None]
        assert rows["many"].tolist() == [["pos", "neg"], [], None]
        assert rows.attrs["classes"] == {"label": ["neg", "pos"], "many": ["neg", "pos"]}
    examples = read(data.select([0]))
    assert examples.label_names == ("neg", "pos") and examples.labels.tolist() == [1]
    turned = read(data.select([0]), columns=Columns(label_names=["pos", "mixed", "neg"]))
    assert turned.labels.tolist() == [0]
    hidden = read(data.select([1, 2]), labelled=False)
    assert hidden.labels is None


def test_a_transform_of_a_data_set_is_applied() -> None:
    data = Dataset.from_dict({"text": ["w5", "w6"]})
    turned = data.with_transform(lambda batch: {"text": ["w9" for _ in batch["text"]]})
    assert cells(table(turned)) == {"text": ["w9", "w9"]}


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
        return Dataset.from_dict(COLUMNS)

    monkeypatch.setattr(import_module("bhpeft_pyro.data.table"), "load_dataset", load)
    assert cells(table(name)) == COLUMNS and calls == [called]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing.*cannot be loaded") as caught:
        table("nobody/nothing")
    assert caught.value.__cause__ is not None


def test_lists_of_texts_and_of_pairs() -> None:
    texts = ["a", "b"]
    column = Dataset.from_dict({"text": texts})["text"]
    series = pd.Series(texts)
    for source in (texts, column, pd.Index(texts), series, series.to_numpy(), iter(texts)):
        assert cells(table(source)) == {"text": texts}
    pairs = [("why", ["a", "b"]), ["what", ["c", "d"]]]
    assert cells(table(pairs, ("question", "choices"))) == {
        "question": ["why", "what"],
        "choices": [["a", "b"], ["c", "d"]],
    }


def read(source: Any, kind: Any = "class", **options: Any) -> Examples:
    return encode(source, bert_like(), kind=kind, **options)


def test_choices_are_the_same_from_every_source(tmp_path: Path) -> None:
    choices = [["yes", "no"], ["so so", "bad", "good", "dull"], ["the", "a", "long"]]
    answers = [1, 3, 0]
    columns = {"question": ["why", "what", "a"], "choices": choices, "answer": answers}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    letters = [{"text": options, "label": [*"ABCD"[: len(options)]]} for options in choices]
    forms: list[Any] = [
        columns,
        rows,
        Dataset.from_dict(columns),
        write_lines(tmp_path / "rows.jsonl", rows),
        {**columns, "choices": letters},
        {**columns, "choices": letters, "answer": ["B", "D", "A"]},  # as on the hub
        {**columns, "answer": ["no", "dull", "the"]},
        {**columns, "choices": [tuple(options) for options in choices]},
    ]
    write(tmp_path / "rows.csv", pd.DataFrame(columns, dtype=object))
    results = [read(form, "choice") for form in [*forms, tmp_path / "rows.csv"]]
    assert len({result.fingerprint for result in results}) == 1
    assert results[0].labels is not None and results[0].labels.tolist() == answers


def test_ratings_are_numbers_of_any_type(tmp_path: Path) -> None:
    ratings = [1.5, -2.0, 0.25]
    texts = ["a", "b", "c"]
    forms = [
        {"text": texts, "label": ratings},
        {"text": texts, "label": np.array(ratings, np.float32)},
        {"text": np.array(texts), "label": torch.tensor(ratings)},
        {"text": tuple(texts), "label": [*map(str, ratings)]},
        [{"text": text, "label": np.float64(r)} for text, r in zip(texts, ratings, strict=True)],
        write_csv(tmp_path / "rows.csv", text=texts, label=ratings),
    ]
    for form in forms:
        assert read(form, "rating").labels.tolist() == ratings


def test_columns_that_nobody_reads_do_no_harm() -> None:
    endless: list[Any] = []
    endless.append(endless)
    junk = [object(), 1, "\ud83d", endless]
    rows = table({"text": ["good"] * 4, "junk": junk})
    assert len(read(rows, labelled=False)) == 4
    assert tiny_model().encode_texts({"text": ["w5"], "label": [object()]}).labels is None


OK = {"text": ["good", "bad"], "label": ["a", "b"]}
AB = Columns(label_names=["a", "b"])
PAIR = Columns(pair="b")
HOURS = Columns(extra=["hours"])


def texts(*values: Any) -> dict[str, list[Any]]:
    return {"text": list(values), "label": [f"{k % 2}" for k in range(len(values))]}


def labels(*values: Any, **more: Any) -> dict[str, list[Any]]:
    return {"text": ["good"] * len(values), "label": list(values), **more}


def quiz(choices: Any, answer: Any = 0) -> dict[str, list[Any]]:
    first = 0 if not isinstance(answer, str) else "yes"
    return {
        "question": ["why", "why not"],
        "choices": [["yes", "no"], choices],
        "answer": [first, answer],
    }


def asked(names: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"question": "a", "choices": {"text": ["b", "c"], "label": names}, "answer": answer}]


def streamed() -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": "good"}, {"text": "bad", "label": "a"})

    return IterableDataset.from_generator(rows)


Case = tuple[Any, dict[str, Any], str]
SOURCES: list[Case] = [
    (source, {}, message)
    for source, message in (
        ([], "there are no rows"),
        ({"text": [], "label": []}, "there are no rows"),
        ({"words": ["a"], "label": [1]}, "column 'text' is missing; columns there: words, label"),
        (["good", "bad"], "column 'label' is missing; columns there: text"),
        ({"text": ["good", "bad"], "label": ["a"]}, "differ in length: 'text' 2, 'label' 1"),
        ({"text": ["good"], "label": 1}, "column 'label' is a int"),
        ({"text": "good", "label": [1]}, "column 'text' is a str"),
        ({"text": {"good"}, "label": [0]}, "column 'text' is a set"),
        (pd.DataFrame([["a", "b", 0]], columns=["text", "text", "label"]), "'text' is there twice"),
        (DatasetDict(train=Dataset.from_dict(OK)), "splits.*'train'"),
        (5, "source is a int"),
        ("good film", "a single text goes in a list"),
        ("a\0b", "a single text goes in a list"),
        ("w" * 300 + ".csv", "a single text goes in a list"),
        ("nowhere.csv", "nowhere.csv: no such file"),
        ("reviews.cvs", r"'reviews\.cvs' is neither a file nor the name of"),
        (Path("data.parquet"), "data.parquet: no such file"),
        ([{"text": "good", "label": 1}, "bad"], "row 0: a dict .*expected a text, or dicts"),
        (texts("good", "", " \n\t"), r"'text', row 1: the text is empty.* \(and 1 more: row 2\)"),
        (texts("good", None), "column 'text', row 1: the text is missing"),
        (texts("good", float("nan")), "column 'text', row 1: the text is missing"),
        (texts("good", 2), "column 'text', row 1: 2 is a int; expected a str"),
        (texts("good", "cut \ud83d"), "column 'text', row 1: .* is not valid Unicode"),
        (labels("a", "\ud83d"), "column 'label', row 1: .* is not valid Unicode"),
        (streamed(), "column 'label', row 0: the label is missing"),
        (labels(None, "a"), "column 'label', row 0: the label is missing"),
        (labels("a", pd.NA), "column 'label', row 1: the label is missing"),
        (labels("a", " "), "row 1: the label is empty"),
    )
]
SOURCES += [
    (labels("a", "c"), {"columns": AB}, "row 1: 'c' is not one of"),
    (OK, {"columns": Columns(max_length=2)}, "max_length=2"),
    (OK, {"columns": PAIR}, "column 'b' is missing"),
    (["a"], {"columns": PAIR, "labelled": False}, "row 0: a str .*a pair"),
    ([("a", "b", "c")], {"columns": PAIR, "labelled": False}, "row 0: a tuple .*a pair"),
]
RATINGS: list[Case] = [
    (source, {"kind": "rating", **options}, message)
    for source, options, message in (
        (labels(float("inf"), 2.0), {}, "row 0: inf is not finite"),
        (labels(1.0, 1e39), {}, "row 1: 1e\\+39 is too large"),
        (labels("1.0", "2,0", "nan"), {}, "row 1: '2,0' is not a number; expected a rating"),
        (labels(True, False), {}, "row 0: True is a bool"),
        (labels(1.0, None), {}, "row 1: the label is missing"),
        (labels(1.0), {"columns": HOURS}, "column 'hours' is missing"),
        (labels(1.0, 2.0, hours=[1, None]), {"columns": HOURS}, "'hours', row 1: the number is"),
        (labels(1.0, 2.0, hours=["1", "x"]), {"columns": HOURS}, "'hours', row 1: 'x' is not a"),
    )
]
QUIZZES: list[Case] = [
    (source, {"kind": "choice"}, message)
    for source, message in (
        (quiz(["yes"]), "column 'choices', row 1: 1 choices; expected 2 to 8"),
        (quiz(["yes"] * 9), "row 1: 9 choices"),
        (quiz(["yes", " "]), "column 'choices', row 1: choice 1: the text is empty"),
        (quiz(["yes", 3]), "row 1: choice 1: 3 is a int"),
        (quiz("yes"), "column 'choices', row 1: 'yes' is not a list"),
        (quiz(["yes", "no"], 2), "column 'answer', row 1: answer 2; expected 0 to 1"),
        (quiz(["yes", "no"], "maybe"), "row 1: 'maybe' matches 0"),
        (quiz(["yes", "yes"], "yes"), "row 1: 'yes' matches 2"),
        (quiz(["yes", "no"], None), "row 1: the label is missing"),
        (asked(["A"], "A"), "row 0: 2 texts but 1 labels"),
        (asked(2, 1), "row 0: a int; expected a list of str"),
        (asked(["1", "2"], 0), r"row 0: 0 matches 0 of the choices \['1', '2'\]"),
    )
]
SEVERAL: list[Case] = [
    (source, {"kind": "labels", **options}, message)
    for source, options, message in (
        (labels(["a", "b"], "c", ["a"]), {}, "column 'label', row 1"),
        (labels(["a", "b"], None, ["a"]), {}, "row 1: the label is missing"),
        (labels(["a"], ["b"], ["z"]), {"columns": AB}, "row 2: 'z' is not"),
        (labels("['a']", "[]"), {}, "row 0: .* is not a list; expected JSON"),
        (labels("[" * 10**5, "[]"), {}, "row 0: .* is not a list; expected JSON"),
        (labels(["a"], ["b"], ["a", None]), {}, "row 2: the label is missing"),
        (labels(["a"], [" "], []), {}, "row 1: the label is empty"),
    )
]


@pytest.mark.parametrize(("source", "options", "message"), [*SOURCES, *RATINGS, *QUIZZES, *SEVERAL])
def test_what_is_wrong_and_where(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        encode(source, bert_like(), **{"kind": "class", **options})
    assert len(str(error.value)) < 1000


FILES: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "empty.jsonl: there are no rows"),
    "nothing.csv": ("", "nothing.csv: the file is empty"),
    "header.csv": ("text,label\n", "header.csv: there are no rows"),
    "mixed.csv": ("text;label\ngood,a\n", "mixed.csv, column 'label', row 2: the label is missing"),
    "ragged.csv": ("text,label\ngood,a\nbad,so,b\n", "ragged.csv: row 3 has 3 cells.*commas"),
    "open.csv": ('text,label\n"good,a\n', "open.csv: line 2.*quotes around a cell"),
    "after.csv": ('text,label\n"w5 open,a\nw6,b\nw7 "w8",c\n', "after.csv: line 4.*not closed"),
    "gap.csv": (
        "text,label\ngood,a\nbad,\nfilm,b\nso,\n",
        r"^gap.csv, column 'label', row 3: the label is missing .* \(and 1 more: row 5\)$",
    ),
    "line.csv": ("\ntext,label\ngood,a\n", "line.csv.*the first line is empty; expected the names"),
    "formulas.csv": ("text,'=a,=a\nbad,0,1\n", "column '=a' is there twice"),
    "twice.csv": ("text,label,text\nbad,0,good\n", "column 'text' is there twice"),
    "nul.csv": ("te\0xt,label\ngood,0\n", "nul.csv: NUL characters"),
    "blank.csv": ('text,label\ngood,a\n"",b\n', "blank.csv, column 'text', row 3: the text is"),
    "broken.jsonl": ('{"text": "good", "la\n', "broken.jsonl: line 1 is not JSON"),
    "twice.jsonl": ('{"text": "bad", "text": "good", "label": 0}', "'text' is there twice"),
    "deep.jsonl": ('{"a":' * 100_000, "deep.jsonl: "),
    "number.jsonl": ('{"text": "a"}\n7\n', "number.jsonl: line 2 is no object"),
    "number.json": ('[{"text": "a"}, 7]', "number.json: entry 1 is no object"),
    "cut.json": ('[{"text": "a"}, ', "cut.json: "),
    "array.json": ('[{"text": " ", "label": "a"}]', "array.json, column 'text', entry 0: the text"),
    "lines.jsonl": (
        '{"text": "good", "label": "a"}\n\n{"text": " ", "label": "b"}\n',
        "lines.jsonl, column 'text', line 3: the text is empty",
    ),
    "rows.txt": ("good", r"rows.txt'?: expected a file .csv"),
    "rows.csv.gz": ("", r"rows.csv.gz'?: expected a file .csv"),
    "rows.parquet": ("good", "rows.parquet: "),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        encode(str(tmp_path / name), bert_like(), kind="class")


@pytest.mark.parametrize(("name", "library"), [("a.xlsx", "openpyxl"), ("a.ods", "odf")])
def test_spreadsheets_need_a_library_and_are_whole(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"PK damaged")
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, library, None)
        with pytest.raises(DataError, match=r"pip install 'bhpeft_pyro\[sheets\]'"):
            table(tmp_path / name)
    pytest.importorskip(library)
    with pytest.raises(DataError, match=name):
        table(tmp_path / name)


def test_part_of_a_table_is_numbered_as_the_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", text=["a", "b", "", "c"], label=["x", "y", "x", "y"])
    with pytest.raises(DataError, match=r"^rows\.csv, column 'text', row 4: ") as error:
        encode(table(path).iloc[1:], tiny_tokenizer(), kind="class")
    assert error.value.rows == (1,)  # in what was given


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
        (OK, {"labelled": False}, {"columns": HOURS}, "without the column 'hours'"),
        (OK["text"], {"labelled": False}, {}, "without labels"),
        (labels("b", "a"), {}, {"columns": Columns(label_names=["b", "c"])}, "has the classes"),
        (texts("a the good", "bad"), {}, {"columns": Columns(max_length=4)}, "max_length=4"),
    ],
)
def test_examples_that_were_encoded_otherwise(
    source: Any, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    examples = encode(source, bert_like(), **{"kind": "class", **first})
    with pytest.raises(DataError, match=message):
        encode(examples, **{"tokenizer": bert_like(), "kind": "class", **then})


@pytest.mark.parametrize(
    "fields", [{"text": "label"}, {"pair": "text"}, {"extra": ["label"]}, {"label_names": ["a"]}]
)
def test_columns(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Columns(**fields)
