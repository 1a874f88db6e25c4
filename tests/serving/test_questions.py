"""Tables are checked before they wait."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from bhpeft_pyro.serving.engine import Refused
from bhpeft_pyro.serving.protocols import table_of


def like(**changes: Any) -> Any:
    usual = {"texts": ("text",), "numbers": (), "kind": "class"}
    return SimpleNamespace(**usual | changes)


def test_only_the_columns_that_are_read_are_kept() -> None:
    columns = {"id": [1, 2], "price": [1, 2.5], "text": ["a", "b"]}
    table = table_of(columns, like(numbers=("price",)))
    assert table == {"text": ["a", "b"], "price": [1, 2.5]}


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"body": ["a"]}, "column 'text' is missing; columns there: .*body"),
        ({"text": "a"}, "expected a list"),
        ({"text": []}, "expected a list"),
        ({"text": ["a", None]}, "row 1: None; expected a text"),
        ({"text": [["a"]]}, "row 0"),
        ({"text": ["a", "b"], "price": [1]}, "has 1 cells, others 2"),
        *(({"text": ["a"], "price": [p]}, "finite") for p in (True, "1", math.inf, math.nan, None)),
    ],
)
def test_other_columns_are_refused(columns, why) -> None:
    with pytest.raises(Refused, match=why) as refused:
        table_of(columns, like(numbers=("price",) if "price" in columns else ()))
    assert refused.value.status == 422


def test_lists_are_for_choices() -> None:
    choices = like(kind="choice", texts=("question", "choices"))
    table_of({"question": ["a"], "choices": [["b", "c"]]}, choices)
