"""What clients may send, and what they get: three protocols, all of which ask for a table.

- `TextRequest` has the shape of Hugging Face's Text Embeddings Inference. It differs in one point:
  `["first", "second"]` is two texts here, as any list of strings; there it is a text and its pair.
- `TableRequest` has that of MLflow's scoring server, and takes every round: pairs, choices and
  columns of numbers too. The answers are what `bhpeft predict` says of each row.
- `TensorRequest` has that of the Open Inference Protocol (KServe, Triton, MLServer). An input
  tensor is a column of the training data, of shape [N] or [N, 1]. The outputs are the columns of
  `bhpeft predict` (tensors have no null: no reason is "", and `answered` is false where nothing is
  promised), and `scores` (N, C) for classes, labels and choices, whose names are its parameter
  `labels`. What is no number, truth value or text, such as several labels, is a text of JSON.

What a client asks for and does not get is refused, as the answer would be another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from ..data.table import by_column
from .rounds import Row, Served, Table

T = TypeVar("T")

_NULLS = {"reason": "", "answered": False}  # tensors have no null
_TYPES = {bool: "BOOL", int: "INT64", float: "FP64", str: "BYTES"}
_TABLES = ("dataframe_split", "dataframe_records", "instances", "inputs")
_DATATYPE = "^(BYTES|BOOL|U?INT(8|16|32|64)|FP(16|32|64))$"
_APPLIED = {"class": "softmax", "choice": "softmax", "labels": "sigmoid"}  # to make scores


class Refused(Exception):
    """A request that is not answered, with the HTTP status that says whose fault it is: 401 no
    token, 403 from a web page, 404 another version, 413 too large, 415 binary tensors, 422 cannot
    be read, 424 the prediction failed, 429 too much to do, 503 not ready, or the disk cannot be
    used."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Parameters(_Model):
    """Of a `TextRequest`, as huggingface_hub names them."""

    top_k: PositiveInt | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None


class TextRequest(_Model):
    """Texts, or pairs of texts, to a round that reads nothing else."""

    inputs: str | list[str | list[str]]
    details: bool = False
    truncate: bool = True
    truncation_direction: Literal["Right", "right"] = "Right"
    raw_scores: Literal[False] = False
    parameters: Parameters | None = None

    def frame(self, served: Served) -> Table:
        """The columns that the round reads."""
        if served.kind == "choice" or served.numbers:
            raise Refused(422, "this round does not read texts alone; POST a table to /invocations")
        does = _APPLIED.get(served.kind, "none")
        if self.parameters and self.parameters.function_to_apply not in (None, does):
            raise Refused(422, f"function_to_apply: this round has {does!r} alone")
        inputs = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        rows = [row if isinstance(row, list) else [row] for row in inputs]
        if any(len(row) != len(served.texts) for row in rows):
            expected = "texts" if len(served.texts) == 1 else "pairs, [[first, second], ...]"
            raise Refused(422, f"inputs: expected {expected}")
        return check_table(
            {name: [row[i] for row in rows] for i, name in enumerate(served.texts)}, served
        )

    def write(self, rows: Sequence[Row], served: Served, model: str) -> Any:
        """The most probable labels of each text; with `details` all that is known of it.

        A single text has no list around its answer, unless there are `parameters`:
        huggingface_hub, which sends them, expects one.
        """
        top = self.parameters.top_k if self.parameters else None
        answers: list[Any] = []
        for row in rows:
            scores = dict([*row["scores"].items()][:top]) if "scores" in row else None
            if self.details:
                kept = row if scores is None else row | {"scores": scores}
                answers.append(in_full(kept, served))
            else:  # of a rating its mean, under the name of its column
                named = scores or {served.posterior.columns.label: row["prediction"]}
                answers.append([{"label": name, "score": score} for name, score in named.items()])
        listed = isinstance(self.inputs, list) or self.parameters is not None
        return answers if listed else answers[0]


class Split(BaseModel):
    """A table as the names of its columns and its rows."""

    model_config = ConfigDict(strict=True)
    columns: list[str]
    data: list[list[Any]]

    @model_validator(mode="after")
    def _is_rectangular(self) -> Self:
        if len({*self.columns}) < len(self.columns):
            raise ValueError("a column is there twice")
        if any(len(row) != len(self.columns) for row in self.data):
            raise ValueError("a row has more or fewer cells than there are columns")
        return self


Records = list[dict[str, Any]]
AnyTable = Split | Records | dict[str, list[Any]] | list[str]


class TableRequest(_Model):
    """A table with the columns of the training data, in one of four forms."""

    dataframe_split: Split | None = None
    dataframe_records: Records | None = None
    instances: AnyTable | None = None
    inputs: AnyTable | None = None
    params: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    truncate: ClassVar[bool] = True

    @model_validator(mode="after")
    def _is_one_table(self) -> Self:
        if len(self._tables) != 1:
            raise ValueError(f"expected one of {', '.join(_TABLES)}")
        return self

    @property
    def _tables(self) -> list[AnyTable]:
        tables = (getattr(self, name) for name in _TABLES)
        return [table for table in tables if table is not None]

    def frame(self, served: Served) -> Table:
        """The columns that the round reads."""
        return check_table(columns_of(self._tables[0], served), served)

    def write(self, rows: Sequence[Row], served: Served, model: str) -> Any:
        """All that is known of each row."""
        return {"predictions": [in_full(row, served) for row in rows]}


class InputTensor(BaseModel):
    """A column."""

    model_config = ConfigDict(strict=True)
    name: str
    shape: Annotated[list[int], Field(min_length=1, max_length=2)]
    datatype: Annotated[str, StringConstraints(pattern=_DATATYPE)]
    data: list[Any]

    @property
    def cells(self) -> list[Any]:
        """The cells of the column."""
        nested = self.data and all(isinstance(cell, list) for cell in self.data)
        return [*chain.from_iterable(self.data)] if nested and len(self.shape) == 2 else self.data

    @model_validator(mode="after")
    def _is_column(self) -> Self:
        if self.shape[1:] not in ([], [1]) or len(self.cells) != self.shape[0]:
            raise ValueError("expected as many cells as its shape says, [N] or [N, 1]")
        return self


class OutputName(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(strict=True)
    name: str


class TensorRequest(_Model):
    """Columns as tensors."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor]
    outputs: list[OutputName] = []
    truncate: ClassVar[bool] = True

    def frame(self, served: Served) -> Table:
        """The columns that the round reads."""
        columns: dict[str, list[Any]] = {}
        for tensor in self.inputs:
            if tensor.name in columns:
                raise Refused(422, f"inputs: {tensor.name!r} is there twice")
            if (tensor.datatype == "BYTES") < (tensor.name in served.texts):
                raise Refused(422, f"inputs: {tensor.name!r} is no tensor of BYTES")
            if (tensor.datatype in ("BYTES", "BOOL")) and tensor.name in served.numbers:
                raise Refused(422, f"inputs: {tensor.name!r} is no tensor of numbers")
            columns[tensor.name] = tensor.cells
        return check_table(columns, served)

    def write(self, rows: Sequence[Row], served: Served, model: str) -> Any:
        """The columns of the answers as tensors."""
        named = {output["name"]: output for output in output_tensors(rows)}
        wanted = [output.name for output in self.outputs] or [*named]
        if unknown := {*wanted} - {*named}:
            expected = ", ".join(named)
            raise Refused(422, f"outputs: got {min(unknown)!r}; expected some of {expected}")
        answer: dict[str, Any] = {"model_name": model, "model_version": served.id}
        answer |= {} if self.id is None else {"id": self.id}
        answer |= {"parameters": {"no_promise": served.no_promise}} if served.no_promise else {}
        return answer | {"outputs": [named[name] for name in named if name in wanted]}


AnyRequest = TextRequest | TableRequest | TensorRequest


class SwapRequest(_Model):
    """The round that is to answer: its id, the beginning of it, or its folder; None: the newest."""

    round: str | None = None


def in_full(row: Row, served: Served) -> dict[str, Any]:
    """All that is known of a row, the id of the round, and why it promises nothing."""
    no_promise = {"no_promise": served.no_promise} if served.no_promise else {}
    return row | {"round": served.id} | no_promise


def output_tensors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The output tensors of answers."""
    outputs = []
    for name in rows[0]:
        cells: list[Any] = [_NULLS.get(name) if row[name] is None else row[name] for row in rows]
        if name != "scores":
            outputs.append(_tensor(name, cells))
            continue
        labels = sorted({label for scores in cells for label in scores})
        data = [scores.get(label, 0.0) for scores in cells for label in labels]
        tensor = {"name": name, "shape": [len(rows), len(labels)], "datatype": "FP64"}
        outputs.append(tensor | {"data": data, "parameters": {"labels": labels}})
    return outputs


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    kind = type(values[0])
    if kind not in _TYPES or any(type(value) is not kind for value in values):
        kind, values = str, [json.dumps(value) for value in values]
    return {"name": name, "shape": [len(values)], "datatype": _TYPES[kind], "data": values}


def model_metadata(name: str, served: Served) -> dict[str, Any]:
    """The metadata of the model in the Open Inference Protocol; its version is the round."""
    columns = dict.fromkeys(served.texts, "BYTES") | dict.fromkeys(served.numbers, "FP64")
    inputs = [{"name": column, "datatype": kind, "shape": [-1]} for column, kind in columns.items()]
    outputs = []
    for tensor in output_tensors(served.sample):
        shape = [-1, *tensor["shape"][1:]]
        if tensor["name"] == "scores" and served.kind == "choice":
            shape = [-1, -1]  # as many as the text has
        outputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape})
    about = {"name": name, "versions": [served.id], "platform": "bhpeft_pyro"}
    return about | {"inputs": inputs, "outputs": outputs}


def columns_of(table: AnyTable, served: Served) -> Mapping[str, list[Any]]:
    """The columns of a table in any form; texts alone are those of the only column of texts."""
    if isinstance(table, Split):
        return {name: [row[i] for row in table.data] for i, name in enumerate(table.columns)}
    if isinstance(table, dict):
        return table
    if table and isinstance(table[0], dict):
        return by_column(table)
    if len(served.texts) > 1:
        raise Refused(422, f"the table has texts alone; expected columns {', '.join(served.texts)}")
    return {served.texts[0]: [*table]}


def _is_there(cell: Any) -> Any:
    if cell is None:
        raise ValueError("there is no label")
    return cell


Text = Annotated[str, StringConstraints(pattern=r"\S")]
Number = Annotated[float, AllowInfNan(False)]
Label = Annotated[Any, AfterValidator(_is_there)]


@lru_cache(maxsize=16)
def _table_type(
    texts: tuple[str, ...], numbers: tuple[str, ...], labels: tuple[str, ...], kind: str
) -> type[BaseModel]:
    """The model of a table with these columns; others are left out."""
    text: Any = Text | list[Any] | dict[str, Any] if kind == "choice" else Text
    cells = dict.fromkeys(texts, text) | dict.fromkeys(numbers, Number)
    cells |= dict.fromkeys(labels, Label)
    fields: Any = {  # a column may have any name, an attribute may not
        f"column_{number}": (list[cell], Field(alias=name, min_length=1))  # type: ignore[valid-type]
        for number, (name, cell) in enumerate(cells.items())
    }
    return create_model("Table", __config__=ConfigDict(strict=True), **fields)


def check_table(columns: Mapping[str, Any], served: Served, *labels: str) -> Table:
    """Of a request's columns those that a round reads, and those of `labels`, if all are there, of
    one length, and hold what they should."""
    kind = _table_type(served.texts, served.numbers, labels, served.kind)
    table: Table = check(TypeAdapter(kind), dict(columns)).model_dump(by_alias=True)
    if len({len(cells) for cells in table.values()}) > 1:
        raise Refused(422, "the columns have different numbers of cells")
    return table


def check(kind: TypeAdapter[T], value: Any) -> T:
    """A value of a request, if it is of this type."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(422, f"{where or 'the body'}: {first['msg']}") from None


def openapi(version: str, paths: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The description of the paths that take a body, by the models of their requests."""
    schemas: dict[str, Any] = {}
    described = {}
    for path, model in paths.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
        content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        described[path] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": content}},
                "responses": {"200": {"description": "The answer"}},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "bhpeft_pyro", "version": version},
        "paths": described,
        "components": {"schemas": schemas},
    }
