"""`/invocations` has the shape of MLflow's scoring server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bhpeft_pyro.serving.engine import Refused
from bhpeft_pyro.serving.protocols import invocations

TABLE = {"text": ["w5", "w6"]}


@pytest.mark.parametrize(
    "payload",
    [
        {"dataframe_split": {"columns": ["id", "text"], "data": [[1, "w5"], [2, "w6"]]}},
        {"dataframe_split": {"columns": ["text"], "index": [3, 4], "data": [["w5"], ["w6"]]}},
        {"dataframe_records": [{"text": "w5", "id": 1}, {"text": "w6", "id": 2}]},
        {"dataframe_records": [{"text": "w5"}, {"id": 2, "text": "w6"}]},
        {"instances": ["w5", "w6"]},
        {"instances": [{"text": "w5"}, {"text": "w6"}], "params": {}},
        {"inputs": {"text": ["w5", "w6"], "id": [1, 2]}},
        {"inputs": ["w5", "w6"]},
    ],
)
def test_all_shapes_of_a_table(april, payload) -> None:
    assert invocations(payload, april).table == TABLE


@pytest.mark.parametrize(
    "payload",
    [
        *(None, [], {}, {"input": ["w5"]}, {"inputs": ["w5"], "instances": ["w5"]}),
        *({"inputs": wrong} for wrong in (None, "w5", 3, {}, {"text": "w5"}, {"body": ["w5"]})),
        *({"inputs": wrong} for wrong in ([], [3], [{"text": "w5"}, "w6"], [{"text": "w5"}, {}])),
        {"dataframe_split": {"columns": ["text"], "data": [["w5"], []]}},
        {"dataframe_split": {"columns": [["text"]], "data": [["w5"]]}},
        {"dataframe_split": {"columns": "text", "data": ["w5"]}},
        {"dataframe_records": {"text": "w5"}},
    ],
)
def test_what_is_no_table_is_refused(april, payload) -> None:
    with pytest.raises(Refused) as refused:
        invocations(payload, april)
    assert refused.value.status == 422


def test_a_column_that_is_there_twice_is_refused(april) -> None:
    """The last would win, whatever the first says."""
    split = {"columns": ["text", "id", "text"], "data": [["w5", 1, "w6"]]}
    with pytest.raises(Refused, match="column 'text' is there twice"):
        invocations({"dataframe_split": split}, april)


def test_parameters_are_refused(april) -> None:
    with pytest.raises(Refused, match=r"params: got .*; this model has none"):
        invocations({"inputs": ["w5"], "params": {"temperature": 2}}, april)


def test_a_column_that_the_first_row_lacks_is_read(april) -> None:
    with pytest.raises(Refused, match="column 'text', row 0: None; expected a text"):
        invocations({"instances": [{"id": 1}, {"text": "w6"}]}, april)


def test_choices_and_numbers(april) -> None:
    other: Any = SimpleNamespace(texts=("question", "choices"), numbers=("price",), kind="choice")
    rows = [{"question": "w5", "choices": ["w6", "w7"], "price": 2.5}]
    table = invocations({"dataframe_records": rows}, other).table
    assert table == {"question": ["w5"], "choices": [["w6", "w7"]], "price": [2.5]}
    with pytest.raises(Refused, match="expected columns question, choices"):
        invocations({"instances": ["w5"]}, other)
    assert april.numbers == ()
