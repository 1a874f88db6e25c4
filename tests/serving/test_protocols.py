"""What the three protocols take, refuse and write."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.serving.requests import (
    Refused,
    TableRequest,
    TensorRequest,
    TextRequest,
    check,
    check_table,
    in_full,
    model_metadata,
)
from bhpeft_pyro.serving.rounds import rows_of

SCORED = [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]
TABLE = {"text": ["w5", "w6"]}


def asked(kind: Any, payload: Any) -> Any:
    return check(TypeAdapter(kind), payload)


def like(**changes: Any) -> Any:
    return SimpleNamespace(**{"texts": ("text",), "numbers": (), "kind": "class"} | changes)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["w5", "w6"]} | changes


def row(**scores: float) -> dict[str, Any]:
    return {"prediction": "good", "scores": scores}


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [
        ("w5", ["w5"]),
        (["w5"], ["w5"]),
        (["w5", "w6"], ["w5", "w6"]),  # a list of two texts is no pair
        ([["w5"], ["w6"]], ["w5", "w6"]),
        (["w5", ["w6"]], ["w5", "w6"]),
    ],
)
def test_texts_and_the_shape_of_their_answer(april, inputs, texts) -> None:
    request = asked(TextRequest, {"inputs": inputs})
    assert request.frame(april) == {"text": texts} and request.truncate
    answer = request.write([row(good=0.75, bad=0.25)] * len(texts), april, "shop")
    assert answer == ([SCORED] * len(texts) if isinstance(inputs, list) else SCORED)


def test_pairs(april) -> None:
    columns = replace(april.posterior.columns, pair="answer_text", label="fits")
    pairs = replace(april, posterior=april.posterior.replace(columns=columns))
    request = asked(TextRequest, {"inputs": [["w5", "w6"], ["w7", "w8"]]})
    assert request.frame(pairs) == {"text": ["w5", "w7"], "answer_text": ["w6", "w8"]}
    for wrong in (["w5", "w6"], "w5", [["w5"]], [["w5", "w6", "w7"]]):
        with pytest.raises(Refused, match="pairs"):
            asked(TextRequest, {"inputs": wrong}).frame(pairs)
    rating = [{"prediction": 2.5}]  # of a rating the mean, under the name of its column
    assert request.write(rating, pairs, "shop") == [[{"label": "fits", "score": 2.5}]]


def test_labels_that_are_asked_for(april) -> None:
    scores = {"good": 0.5, "bad": 0.3, "odd": 0.2}
    for top in (1, 2, 5, None):
        payload = {"inputs": "w5", "parameters": {"top_k": top, "function_to_apply": "softmax"}}
        (labels,) = asked(TextRequest, payload).write([row(**scores)], april, "shop")
        assert [label["label"] for label in labels] == [*scores][:top]
        details = asked(TextRequest, payload | {"details": True})
        (answer,) = details.write([row(**scores)], april, "shop")
        assert [*answer["scores"]] == [*scores][:top] and answer["round"] == april.id


@pytest.mark.parametrize(
    ("kind", "does"), [("class", "softmax"), ("labels", "sigmoid"), ("rating", "none")]
)
def test_what_makes_scores_may_be_asked_for_as_it_is(kind, does) -> None:
    for applied in ("softmax", "sigmoid", "none"):
        payload = {"inputs": "w5", "parameters": {"function_to_apply": applied}}
        if applied == does:
            asked(TextRequest, payload).frame(like(kind=kind))
        else:
            with pytest.raises(Refused, match="function_to_apply"):
                asked(TextRequest, payload).frame(like(kind=kind))


@pytest.mark.parametrize(
    "payload",
    [
        {"dataframe_split": {"columns": ["id", "text"], "data": [[1, "w5"], [2, "w6"]]}},
        {"dataframe_split": {"columns": ["text"], "index": [3, 4], "data": [["w5"], ["w6"]]}},
        {"dataframe_records": [{"text": "w5", "id": 1}, {"id": 2, "text": "w6"}]},
        {"instances": ["w5", "w6"]},
        {"instances": [{"text": "w5"}, {"text": "w6"}], "params": {}},
        {"inputs": {"text": ["w5", "w6"], "id": [1, 2]}},
        {"inputs": ["w5", "w6"]},
    ],
)
def test_all_forms_of_a_table(april, payload) -> None:
    assert asked(TableRequest, payload).frame(april) == TABLE


@pytest.mark.parametrize(
    "column", [tensor(), tensor(shape=[2, 1]), tensor(shape=[2, 1], data=[["w5"], ["w6"]])]
)
def test_tensors_are_columns(april, column) -> None:
    other = tensor(name="id", datatype="INT64", data=[1, 2])
    assert asked(TensorRequest, {"inputs": [other, column]}).frame(april) == TABLE


TEXTS = [
    *(None, 3, "w5", [], {}, {"input": "w5"}, {"inputs": "w5", "detail": True}),
    *({"inputs": wrong} for wrong in (None, 3, True, {}, [], [[]], "", " ", ["w5", ""])),
    *({"inputs": wrong} for wrong in (["w5", 3], [["w5", "w6"]], [[["w5"]]], "\ud800")),
    *({"inputs": "w5", name: "yes"} for name in ("details", "truncate", "raw_scores")),
    {"inputs": "w5", "raw_scores": True},
    {"inputs": "w5", "truncation_direction": "Left"},
    *({"inputs": "w5", "parameters": {"top_k": wrong}} for wrong in (0, -1, True, 1.5, "2")),
    *({"inputs": "w5", "parameters": wrong} for wrong in (3, [], {"top": 1})),
    *({"inputs": "w5", "parameters": {"function_to_apply": f}} for f in ("sigmoid", "none", 1)),
]
TABLES = [
    *(None, [], {}, {"input": ["w5"]}, {"inputs": ["w5"], "instances": ["w5"]}),
    *({"inputs": wrong} for wrong in (None, "w5", 3, {}, {"text": "w5"}, {"body": ["w5"]})),
    *({"inputs": wrong} for wrong in ([], [3], [{"text": "w5"}, "w6"], [{"text": "w5"}, {}])),
    {"inputs": {"text": ["w5"], "\ud800": "w5"}},
    {"inputs": ["w5"], "params": {"temperature": 2}},
    {"dataframe_split": {"columns": ["text"], "data": [["w5"], []]}},
    {"dataframe_split": {"columns": [["text"]], "data": [["w5"]]}},
    {"dataframe_split": {"columns": "text", "data": ["w5"]}},
    {"dataframe_split": {"columns": ["text", "text"], "data": [["w5", "w6"]]}},
    {"dataframe_records": {"text": "w5"}},
]
TENSORS = [
    *(None, [], {}, {"inputs": None}, {"inputs": []}, {"inputs": ["w5"]}),
    *(
        {"inputs": [tensor(**wrong)]}
        for wrong in (
            *({"name": 3}, {"name": "body"}, {"shape": [3]}, {"shape": 2}, {"shape": []}),
            *({"datatype": "INT64"}, {"datatype": None}, {"datatype": "bytes"}),
            *({"shape": [1, 2]}, {"data": "w5"}, {"data": ["w5", 3]}, {"shape": ["2"]}),
        )
    ),
    {"inputs": [{k: v for k, v in tensor().items() if k != "datatype"}]},
    {"inputs": [tensor(), tensor()]},
    {"inputs": [tensor()], "outputs": ["prediction"]},
    {"inputs": [tensor()], "outputs": "prediction"},
    {"inputs": [tensor()], "id": 3},
]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        *((TextRequest, payload) for payload in TEXTS),
        *((TableRequest, payload) for payload in TABLES),
        *((TensorRequest, payload) for payload in TENSORS),
    ],
)
def test_what_is_no_request_is_refused(april, kind, payload) -> None:
    with pytest.raises(Refused) as refused:
        asked(kind, payload).frame(april)
    assert refused.value.status == 422


def test_rounds_that_read_more_than_texts_point_to_tables() -> None:
    for change in ({"kind": "choice"}, {"numbers": ("price",)}):
        with pytest.raises(Refused, match="/invocations"):
            asked(TextRequest, {"inputs": "w5"}).frame(like(**change))


def test_choices_and_numbers() -> None:
    other = like(texts=("question", "choices"), numbers=("price",), kind="choice")
    rows = [{"question": "w5", "choices": ["w6", "w7"], "price": 2.5}]
    table = asked(TableRequest, {"dataframe_records": rows}).frame(other)
    assert table == {"question": ["w5"], "choices": [["w6", "w7"]], "price": [2.5]}
    with pytest.raises(Refused, match="question, choices"):
        asked(TableRequest, {"instances": ["w5"]}).frame(other)


def test_columns_of_numbers_are_of_a_type_of_numbers() -> None:
    price = tensor(name="price", data=[1, 2.5])
    for kind in ("FP32", "INT64", "UINT8", "BYTES", "BOOL", "FP33"):
        payload = {"inputs": [tensor(), price | {"datatype": kind}]}
        if kind in ("FP32", "INT64", "UINT8"):
            table = asked(TensorRequest, payload).frame(like(numbers=("price",)))
            assert table["price"] == [1, 2.5]
        else:
            with pytest.raises(Refused):
                asked(TensorRequest, payload).frame(like(numbers=("price",)))


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"body": ["a"]}, "text"),
        ({"text": "a"}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", None]}, "text.1"),
        ({"text": [["a"]]}, "text.0"),
        ({"text": ["a", "b"], "price": [1]}, "different numbers of cells"),
        *(({"text": ["a"], "price": [p]}, "price") for p in (True, "1", math.inf, math.nan, None)),
    ],
)
def test_other_columns_are_refused(columns, where) -> None:
    with pytest.raises(Refused, match=where) as refused:
        check_table(columns, like(numbers=("price",) if "price" in columns else ()))
    assert refused.value.status == 422


def test_tensors_have_their_types(april) -> None:
    good = {"prediction": "good", "epistemic": 0.5, "answered": True, "labels": ["a"]}
    bad = {"prediction": "bad", "epistemic": 0.1, "answered": False, "labels": []}
    rows = [
        good | {"scores": {"good": 0.75, "bad": 0.25}},
        bad | {"scores": {"bad": 0.6, "good": 0.4}},
    ]
    request = asked(TensorRequest, {"inputs": [tensor()], "id": "7"})
    written = request.write(rows, april, "shop")
    about = {name: written[name] for name in ("model_name", "model_version", "id")}
    assert about == {"model_name": "shop", "model_version": april.id, "id": "7"}
    outputs = {output.pop("name"): output for output in written["outputs"]}
    assert outputs == {
        "prediction": {"shape": [2], "datatype": "BYTES", "data": ["good", "bad"]},
        "epistemic": {"shape": [2], "datatype": "FP64", "data": [0.5, 0.1]},
        "answered": {"shape": [2], "datatype": "BOOL", "data": [True, False]},
        "labels": {"shape": [2], "datatype": "BYTES", "data": ['["a"]', "[]"]},
        "scores": {
            "shape": [2, 2],
            "datatype": "FP64",
            "data": [0.25, 0.75, 0.6, 0.4],
            "parameters": {"labels": ["bad", "good"]},
        },
    }
    chosen = asked(TensorRequest, {"inputs": [tensor()], "outputs": [{"name": "scores"}]})
    (only,) = chosen.write(rows, april, "shop")["outputs"]
    assert only["name"] == "scores"
    unknown = asked(TensorRequest, {"inputs": [tensor()], "outputs": [{"name": "score"}]})
    with pytest.raises(Refused, match="score"):
        unknown.write(rows, april, "shop")


def test_metadata_say_what_is_read_and_written(april) -> None:
    about = model_metadata("shop", april)
    assert about["versions"] == [april.id]
    assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    outputs = {output["name"]: (output["datatype"], output["shape"]) for output in about["outputs"]}
    assert outputs["prediction"] == outputs["reason"] == ("BYTES", [-1])
    assert outputs["scores"] == ("FP64", [-1, 2]) and outputs["answered"] == ("BOOL", [-1])
    written = asked(TensorRequest, {"inputs": [tensor()]}).write(april.sample, april, "shop")
    assert {output["name"]: output["datatype"] for output in written["outputs"]} == {
        name: kind for name, (kind, _) in outputs.items()
    }


def test_classes_are_named_and_ordered() -> None:
    draws = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]])
    first, second = rows_of(ClassForecast.from_draws(draws, label_names=["a", "b", "c"]))
    assert first["scores"] == pytest.approx({"b": 0.5, "c": 0.3, "a": 0.2})
    assert [*first["scores"]] == ["b", "c", "a"] and [*second["scores"]] == ["a", "b", "c"]
    assert first["prediction"] == "b" and first["probability"] == pytest.approx(0.5)
    full = in_full(first, like(id="5f0c", no_promise="none was made"))
    assert full == first | {"round": "5f0c", "no_promise": "none was made"}


def test_choices_that_do_not_exist_have_no_score() -> None:
    draws = torch.tensor([[[0.3, 0.7, 0.0], [0.1, 0.2, 0.7]]])
    exist = torch.tensor([[True, True, False], [True, True, True]])
    first, second = rows_of(ClassForecast.from_draws(draws, choices=exist))
    assert [*first["scores"]] == ["1", "0"] and [*second["scores"]] == ["2", "1", "0"]


def test_several_labels_and_ratings() -> None:
    labels = LabelsForecast.from_draws(torch.tensor([[[0.9, 0.6]]]), label_names=["x", "y"])
    (answer,) = rows_of(labels)
    assert answer["scores"] == pytest.approx({"x": 0.9, "y": 0.6})
    assert answer["prediction"] == ["x", "y"]
    (answer,) = rows_of(RatingForecast.from_draws(torch.tensor([[3.0]]), torch.tensor([[1.0]])))
    assert "scores" not in answer
    assert answer["lower_90"] < answer["prediction"] == 3.0 < answer["upper_90"]
