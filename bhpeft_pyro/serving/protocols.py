"""What clients may send and get: three protocols, all of which ask for a table.

- `predict` has the shape of Hugging Face's Text Embeddings Inference. It differs in one point:
  `["first", "second"]` is two texts here, as any list of strings; there it is a text and its pair.
- `invocations` has that of MLflow's scoring server, and takes every round: pairs, choices and
  columns of numbers too. The answers are what `bhpeft predict` says of each row.
- `infer` has that of the Open Inference Protocol (KServe, Triton, MLServer). An input tensor is a
  column of the training data, of shape [N] or [N, 1]. The outputs are the columns of `bhpeft
  predict` (tensors have no null: no reason is "", and `answered` is false where nothing is
  promised), and `scores` (N, C) for classes, labels and choices, whose names are its parameter
  `labels`. What is no number, truth value or text, such as several labels, is a text of JSON.

What a client asks for and does not get is refused, as the answer would be another one.

A table is checked before it waits: these functions raise `Refused` for what cannot be read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ..base.checks import shown
from ..data.table import by_column
from .answers import Answer
from .engine import Answered, Refused
from .loading import Served, Table

_SHAPES = ("dataframe_split", "dataframe_records", "instances", "inputs")
_NULLS = {"reason": "", "answered": False}  # tensors have no null
_TYPES = {bool: "BOOL", int: "INT64", float: "FP64", str: "BYTES"}
_NUMBERS = re.compile("U?INT(8|16|32|64)|FP(16|32|64)")  # datatypes
_APPLIED = {"class": "softmax", "choice": "softmax", "labels": "sigmoid"}  # to make scores


@dataclass(frozen=True)
class Question:
    """A request that has been read."""

    table: Table  # the columns that the round reads
    write: Callable[[Answered], Any]  # makes what the protocol answers, as JSON has it
    whole: bool = False  # texts that are too long are refused, and not cut


def predict(payload: Any, served: Served) -> Question:
    """A question in the shape of Text Embeddings Inference, to a round that reads texts alone."""
    if not isinstance(payload, dict) or "inputs" not in payload:
        raise Refused(422, f"got {shown(payload)}; expected an object with 'inputs'")
    if served.kind == "choice" or served.numbers:
        raise Refused(422, "this round does not read texts alone; POST a table to /invocations")
    inputs, texts = payload["inputs"], served.texts
    details = option(payload, "details", bool, False)
    cut = option(payload, "truncate", bool, True)
    if option(payload, "raw_scores", bool, False):
        raise Refused(422, "raw_scores: a mixture of networks has none; expected false")
    if (side := payload.get("truncation_direction", "Right")) not in ("Right", "right"):
        raise Refused(422, f"truncation_direction: got {shown(side)}; expected 'Right'")
    top = _top_of(option(payload, "parameters", dict, {}), served)
    rows = inputs if isinstance(inputs, list) else [inputs]
    rows = [row if isinstance(row, list) else [row] for row in rows]
    for row in rows:
        if len(row) != len(texts):
            expected = "a text" if len(texts) == 1 else "a pair of texts, [[first, second], ...]"
            raise Refused(422, f"inputs: got {shown(row)}; expected {expected}")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(texts)}

    def write(answered: Answered) -> Any:
        kept = [replace(row, scores=dict([*row.scores.items()][:top])) for row in answered.rows]
        if details:
            answers: list[Any] = replace(answered, rows=kept).in_full
        else:  # of a rating its mean, under the name of its column
            name = served.posterior.columns.label
            scores = [row.scores or {name: row.said["prediction"]} for row in kept]
            answers = [[{"label": k, "score": v} for k, v in row.items()] for row in scores]
        return answers if isinstance(inputs, list) else answers[0]

    return Question(table_of(columns, served), write, whole=not cut)


def _top_of(parameters: Mapping[str, Any], served: Served) -> int | None:
    """How many labels a text gets by the parameters of huggingface_hub; None for all. Those that
    are null say nothing."""
    given = {name: value for name, value in parameters.items() if value is not None}
    top, applied = given.pop("top_k", None), given.pop("function_to_apply", None)
    if top is not None and (type(top) is not int or top < 1):
        raise Refused(422, f"top_k: got {shown(top)}; expected a whole number from 1 on")
    if applied not in (None, does := _APPLIED.get(served.kind, "none")):
        raise Refused(
            422, f"function_to_apply: got {shown(applied)}; this round has {does!r} alone"
        )
    if given:
        names = ", ".join(map(shown, given))
        raise Refused(422, f"parameters: got {names}; expected top_k or function_to_apply")
    return top


def invocations(payload: Any, served: Served) -> Question:
    """A question in the shape of MLflow."""
    given = [name for name in _SHAPES if isinstance(payload, dict) and name in payload]
    if len(given) != 1:
        raise Refused(422, f"got {shown(payload)}; expected one of {', '.join(_SHAPES)}")
    if payload.get("params"):
        raise Refused(422, f"params: got {shown(payload['params'])}; this model has none")

    def write(answered: Answered) -> Any:
        return {"predictions": answered.in_full}

    return Question(table_of(columns_of(payload[given[0]], served), served), write)


def infer(name: str, payload: Any, served: Served) -> Question:
    """A question of the Open Inference Protocol to the model `name`."""
    if not isinstance(payload, dict):
        raise Refused(422, f"got {shown(payload)}; expected an object with 'inputs'")
    columns: dict[str, Any] = {}
    for tensor in option(payload, "inputs", list, []):
        column, data = _column_of(tensor, served)
        if column in columns:
            raise Refused(422, f"inputs: {shown(column)} is there twice")
        columns[column] = data
    wanted = []
    for output in option(payload, "outputs", list, []):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise Refused(422, f"outputs: {shown(output)}; expected an object with a name")
        wanted.append(output["name"])
    request = {"id": payload["id"]} if isinstance(payload.get("id"), str) else {}
    if request and not _is_whole(request["id"]):
        raise Refused(422, f"id: {shown(request['id'])}; expected whole characters")

    def write(answered: Answered) -> Any:
        outputs = _outputs(answered.rows)
        named = {output["name"]: output for output in outputs}
        if unknown := [output for output in wanted if output not in named]:
            raise Refused(422, f"outputs: {shown(unknown[0])}; expected some of {', '.join(named)}")
        chosen = [output for output in outputs if not wanted or output["name"] in wanted]
        about: dict[str, Any] = {"model_name": name, "model_version": answered.served.id} | request
        if answered.served.no_promise:
            about["parameters"] = {"no_promise": answered.served.no_promise}
        return about | {"outputs": chosen}

    return Question(table_of(columns, served), write)


def _column_of(tensor: Any, served: Served) -> tuple[str, list[Any]]:
    """The name and the cells of a column that an input tensor is."""
    match tensor:
        case {"name": str(name), "shape": [int(n), *ones], "datatype": str(kind), "data": [*data]}:
            if all(isinstance(cell, list) for cell in data) and ones == [1]:
                data = [*chain.from_iterable(data)]
            if name in served.texts and kind != "BYTES":
                raise Refused(422, f"inputs: {shown(name)} is {shown(kind)}; expected BYTES")
            if name in served.numbers and not _NUMBERS.fullmatch(kind):
                raise Refused(422, f"inputs: {shown(name)} is {shown(kind)}; expected a number")
            if len(data) == n and ones in ([], [1]):
                return name, data
    raise Refused(422, f"inputs: {shown(tensor)}; expected name, shape [N], datatype and data")


def _outputs(rows: Sequence[Answer]) -> list[dict[str, Any]]:
    """The output tensors of answers."""
    columns = {
        name: [_NULLS.get(name) if row.said[name] is None else row.said[name] for row in rows]
        for name in rows[0].said
    }
    outputs = [_tensor(name, cells) for name, cells in columns.items()]
    if rows[0].scores:
        labels = sorted({label for row in rows for label in row.scores})
        data = [row.scores.get(label, 0.0) for row in rows for label in labels]
        tensor = {"name": "scores", "shape": [len(rows), len(labels)], "datatype": "FP64"}
        outputs.append(tensor | {"data": data, "parameters": {"labels": labels}})
    return outputs


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    kind = type(values[0])
    if kind not in _TYPES or any(type(value) is not kind for value in values):
        kind, values = str, [json.dumps(value) for value in values]
    return {"name": name, "shape": [len(values)], "datatype": _TYPES[kind], "data": values}


def about_model(name: str, served: Served) -> dict[str, Any]:
    """The metadata of the model in the Open Inference Protocol; its version is the round."""
    columns = dict.fromkeys(served.texts, "BYTES") | dict.fromkeys(served.numbers, "FP64")
    outputs = _outputs(served.sample)
    for output in outputs:
        count = [-1] if served.kind == "choice" else output["shape"][1:]  # as many as the text has
        output["shape"] = [-1, *count] if output["name"] == "scores" else [-1]
    about = {"name": name, "versions": [served.id], "platform": "bhpeft_pyro"}
    inputs = [{"name": column, "datatype": kind, "shape": [-1]} for column, kind in columns.items()]
    kept = ("name", "datatype", "shape")
    return about | {"inputs": inputs, "outputs": [{k: one[k] for k in kept} for one in outputs]}


def columns_of(table: Any, served: Served) -> Mapping[str, Any]:
    """The columns of a table: split into names and rows, a list of rows, or already columns."""
    match table:
        case {"columns": [*names], "data": [*rows]}:
            whole = all(isinstance(row, list) and len(row) == len(names) for row in rows)
            if whole and all(isinstance(name, str) for name in names):
                if len({*names}) < len(names):
                    ((twice, _),) = Counter(names).most_common(1)
                    raise Refused(422, f"column {shown(twice)} is there twice")
                return {name: [row[i] for row in rows] for i, name in enumerate(names)}
        case [dict(), *_] if all(isinstance(row, dict) for row in table):
            return by_column(table)
        case [*texts] if len(served.texts) == 1:
            return {served.texts[0]: texts}
        case dict() if all(isinstance(cells, list) for cells in table.values()):
            return table
    raise Refused(422, f"the table is {shown(table)}; expected columns {', '.join(served.texts)}")


def table_of(columns: Mapping[str, Any], served: Served, *labels: str) -> Table:
    """Of a request's columns those that a round reads, and those of `labels`, if all are there, of
    one length, and hold what they should."""
    table: dict[str, Sequence[Any]] = {}
    for name in (*served.texts, *served.numbers, *labels):
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
        if name in labels:
            what, good = "a label", [cell is not None for cell in cells]
        elif name in served.numbers:
            what, good = "a finite number", [_is_number(cell) for cell in cells]
        else:
            what = "a text, not empty, of whole characters"
            good = [_is_text(cell, served) for cell in cells]
        if not all(good):
            row = good.index(False)
            raise Refused(422, f"column {name!r}, row {row}: {shown(cells[row])}; expected {what}")
        table[name] = cells
    return table


def option(payload: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """An entry of a request that may be left out."""
    value = payload.get(name, default)
    if not isinstance(value, kind):
        raise Refused(422, f"{name}: got {shown(value)}; expected a {kind.__name__}")
    return value


def _is_number(cell: object) -> bool:
    return type(cell) in (int, float) and abs(cell) < math.inf  # type: ignore[arg-type]


def _is_text(cell: object, served: Served) -> bool:
    """Whether a cell may be a text; lists of choices are looked at when they are read."""
    if isinstance(cell, str):
        return _is_whole(cell) and bool(cell.strip())
    return isinstance(cell, list | dict) and served.kind == "choice"


def _is_whole(text: str) -> bool:
    """Whether a text has no half of a pair of surrogates, which cannot be sent back."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
