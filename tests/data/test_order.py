"""Columns and texts that would be misread silently, or with a foreign error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bhpeft_pyro.data import encode
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_tokenizer

TEXTS, LABELS = ["w5", "w6", "w7"], [0, 1, 0]


def read(source: Any, labelled: bool = True) -> tuple[str, ...]:
    return encode(source, tiny_tokenizer(), kind="class", labelled=labelled).texts


@pytest.mark.parametrize("column", [set(TEXTS), frozenset(TEXTS), np.array("w5"), b"w5", 3])
def test_a_column_without_an_order_is_refused(column: Any) -> None:
    with pytest.raises(DataError, match=r"column 'text' is a .*in the order of the rows"):
        read({"text": column, "label": LABELS})


def test_views_of_a_dict_are_in_its_order() -> None:
    rows = dict(zip(TEXTS, LABELS, strict=True))
    assert read({"text": rows.keys(), "label": rows.values()}) == tuple(TEXTS)


@pytest.mark.parametrize("text", ["short", "w5 w6 " * 60, "w" * 300, "a\0b", "w" * 300 + ".csv"])
def test_a_single_text_goes_in_a_list_however_long(text: str) -> None:
    with pytest.raises(DataError, match="a single text goes in a list") as error:
        read(text, labelled=False)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,text\nw5,0,w6\n", "column 'text' is there twice"),
        ("a.jsonl", '{"text": "w5", "text": "w6", "label": 0}', "column 'text' is there twice"),
        ("a.jsonl", "[" * 100_000, "cannot be read"),
        ("a.csv", "te\0xt,label\nw5,0\n", "the header has a NUL character"),
        ("a.csv", "", "cannot be read"),
    ],
)
def test_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_column_of_a_frame_comes_once() -> None:
    with pytest.raises(DataError, match="column 'text' is there twice"):
        read(pd.DataFrame([["w5", "w6", 0]], columns=["text", "text", "label"]))
