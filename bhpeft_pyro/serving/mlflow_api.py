"""`POST /invocations`, in the shape of MLflow's scoring server.

A table comes in as `dataframe_split`, `dataframe_records`, `instances` or `inputs`, with the
columns of the training data; `{"predictions": [...]}` has what `bhpeft predict` says of each row.
It takes every round: pairs, choices, labelled words and columns of numbers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base.checks import shown
from .engine import Answered, Refused
from .loading import Served
from .questions import Question, table_of

__all__ = ["columns_of", "read"]

_SHAPES = ("dataframe_split", "dataframe_records", "instances", "inputs")


def read(payload: Any, served: Served) -> Question:
    """The question of a request's JSON.

    Raises:
        Refused: it has another shape, or its columns cannot be read.
    """
    given = [name for name in _SHAPES if isinstance(payload, dict) and name in payload]
    if len(given) != 1:
        raise Refused(422, f"got {shown(payload)}; expected one of {', '.join(_SHAPES)}")
    return Question(table_of(columns_of(payload[given[0]], served), served), _write)


def _write(answered: Answered) -> Any:
    return {"predictions": [row.in_full(answered.served.id) for row in answered.rows]}


def columns_of(table: Any, served: Served) -> Mapping[str, Any]:
    """The columns of a table: split into names and rows, a list of rows, or already columns.

    Raises:
        Refused: it has another shape.
    """
    match table:
        case {"columns": [*names], "data": [*rows]}:
            whole = all(isinstance(row, list) and len(row) == len(names) for row in rows)
            if whole and all(isinstance(name, str) for name in names):
                return {name: [row[i] for row in rows] for i, name in enumerate(names)}
        case [dict() as first, *_] if all(isinstance(row, dict) for row in table):
            return {name: [row.get(name) for row in table] for name in first}
        case [*texts] if len(served.texts) == 1:
            return {served.texts[0]: texts}
        case dict() if all(isinstance(cells, list) for cells in table.values()):
            return table
    raise Refused(422, f"the table is {shown(table)}; expected columns {', '.join(served.texts)}")
