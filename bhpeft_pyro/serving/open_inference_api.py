"""`/v2/...`, the Open Inference Protocol (KServe, Triton, MLServer), with tensors as JSON.

An input tensor is a column of the training data, such as `text` of datatype BYTES and shape [N] or
[N, 1]. The outputs are the columns of `bhpeft predict`, and `scores` (N, C) for classes, labels and
choices, whose names are its parameter `labels`. What is no number, truth value or text, such as the
list of several labels, is a text of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from .. import __version__
from ..base.checks import shown
from .engine import Answered, Refused
from .loading import Served
from .questions import Question, column_of, table_of

__all__ = ["about_model", "about_server", "read"]

_TYPES = {bool: "BOOL", int: "INT64", float: "FP64", str: "BYTES"}


def about_server() -> dict[str, Any]:
    """The metadata of the server."""
    return {"name": "bhpeft_pyro", "version": __version__, "extensions": []}


def about_model(name: str, served: Served) -> dict[str, Any]:
    """The metadata of the model, whose version is the round."""
    columns = dict.fromkeys(served.texts, "BYTES") | dict.fromkeys(served.numbers, "FP64")
    return {
        "name": name,
        "versions": [served.id],
        "platform": "bhpeft_pyro",
        "inputs": [
            {"name": column, "datatype": kind, "shape": [-1]} for column, kind in columns.items()
        ],
        "outputs": [{"name": "prediction", "datatype": _prediction(served), "shape": [-1]}],
    }


def _prediction(served: Served) -> str:
    if served.kind == "rating" and not served.each_word:
        return "FP64"
    named = served.posterior.columns.label_names is not None
    return "BYTES" if named or served.kind == "labels" or served.each_word else "INT64"


def read(name: str, payload: Any, served: Served) -> Question:
    """The question of a request's JSON to the model `name`.

    Raises:
        Refused: it has another shape, or its tensors cannot be read.
    """
    if not isinstance(payload, dict):
        raise Refused(422, f"got {shown(payload)}; expected an object with 'inputs'")
    columns = {}
    for tensor in column_of(payload, "inputs", list, []):
        match tensor:
            case {"name": str(column), "shape": [int(count), *ones], "data": [*data]}:
                if all(isinstance(cell, list) for cell in data) and ones == [1]:
                    data = [*chain.from_iterable(data)]
                if len(data) == count and ones in ([], [1]):
                    columns[column] = data
                    continue
        raise Refused(422, f"inputs: {shown(tensor)}; expected name, shape [N], datatype and data")
    wanted = []
    for output in column_of(payload, "outputs", list, []):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise Refused(422, f"outputs: {shown(output)}; expected an object with a name")
        wanted.append(output["name"])
    request = {"id": payload["id"]} if isinstance(payload.get("id"), str) else {}
    write = partial(_write, {"model_name": name} | request, wanted)
    return Question(table_of(columns, served), write)


def _write(about: dict[str, Any], wanted: Sequence[str], answered: Answered) -> Any:
    rows = answered.rows
    outputs = [_tensor(name, [row.said[name] for row in rows]) for name in rows[0].said]
    if rows[0].scores:
        labels = sorted({label for row in rows for label in row.scores})
        data = [row.scores.get(label, 0.0) for row in rows for label in labels]
        shape, more = [len(rows), len(labels)], {"parameters": {"labels": labels}}
        outputs.append({"name": "scores", "shape": shape, "datatype": "FP64", "data": data} | more)
    chosen = [output for output in outputs if not wanted or output["name"] in wanted]
    return about | {"model_version": answered.served.id, "outputs": chosen}


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    kind = type(values[0])
    if kind not in _TYPES or any(type(value) is not kind for value in values):
        kind, values = str, [json.dumps(value) for value in values]
    return {"name": name, "shape": [len(values)], "datatype": _TYPES[kind], "data": values}
