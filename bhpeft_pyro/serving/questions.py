"""What a request asks, whatever the protocol: a table, which is checked before it waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.checks import shown
from .engine import Answered, Refused
from .loading import Served, Table

__all__ = ["Question", "column_of", "table_of"]


@dataclass(frozen=True)
class Question:
    """A request that has been read.

    Attributes:
        table: the columns that the round reads.
        write: makes what the protocol answers, as JSON has it.
        whole: texts that are too long are refused, and not cut.
    """

    table: Table
    write: Callable[[Answered], Any]
    whole: bool = False


def table_of(columns: Mapping[str, Any], served: Served) -> Table:
    """Of a request's columns those that a round reads, if it can.

    Raises:
        Refused: a column is missing or empty, or has another length than the first, or a cell is
            not what the column holds.
    """
    table: dict[str, Sequence[Any]] = {}
    for name in (*served.texts, *served.numbers):
        if name not in columns:
            there = ", ".join(map(repr, columns)) or "none"
            raise Refused(422, f"column {name!r} is missing; columns there: {there:.200}")
        cells = columns[name]
        if not isinstance(cells, list) or not cells:
            raise Refused(
                422, f"column {name!r}: got {shown(cells)}; expected a list of one cell or more"
            )
        first = next(iter(table.values()), cells)
        if len(cells) != len(first):
            raise Refused(422, f"column {name!r} has {len(cells)} cells, others {len(first)}")
        number = name in served.numbers
        for row, cell in enumerate(cells):
            if not (_is_number(cell) if number else _is_text(cell, served)):
                what = "a finite number" if number else "a text, not empty, of whole characters"
                raise Refused(422, f"column {name!r}, row {row}: {shown(cell)}; expected {what}")
        table[name] = cells
    return table


def column_of(payload: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """An entry of a request that may be left out."""
    value = payload.get(name, default)
    if not isinstance(value, kind):
        raise Refused(422, f"{name}: got {shown(value)}; expected a {kind.__name__}")
    return value


def _is_number(cell: object) -> bool:
    return type(cell) in (int, float) and abs(cell) < math.inf  # type: ignore[arg-type]


def _is_text(cell: object, served: Served) -> bool:
    """Whether a cell may be a text; lists of words or choices are looked at when they are read."""
    if isinstance(cell, str):
        try:
            cell.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates
            return False
        return bool(cell.strip())
    return isinstance(cell, list | dict) and (served.each_word or served.kind == "choice")
