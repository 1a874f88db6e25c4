"""`/v2/...` is the Open Inference Protocol."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bhpeft_pyro.serving.answers import Answer
from bhpeft_pyro.serving.engine import Answered, Refused
from bhpeft_pyro.serving.protocols import about_model, infer


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["w5", "w6"]} | changes


@pytest.mark.parametrize(
    "given", [tensor(), tensor(shape=[2, 1]), tensor(shape=[2, 1], data=[["w5"], ["w6"]])]
)
def test_tensors_are_columns(april, given) -> None:
    question = infer("shop", {"inputs": [tensor(name="id", data=[1, 2]), given]}, april)
    assert question.table == {"text": ["w5", "w6"]}


@pytest.mark.parametrize(
    "payload",
    [
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
        {"inputs": [tensor()], "id": "\ud800"},
    ],
)
def test_other_requests_are_refused(april, payload) -> None:
    with pytest.raises(Refused) as refused:
        infer("shop", payload, april)
    assert refused.value.status == 422


def test_outputs_have_their_types(april) -> None:
    good = {"prediction": "good", "epistemic": 0.5, "answered": True, "labels": ["a"]}
    bad = {"prediction": "bad", "epistemic": 0.1, "answered": False, "labels": []}
    rows = [Answer(good, {"good": 0.75, "bad": 0.25}), Answer(bad, {"bad": 0.6, "good": 0.4})]
    question = infer("shop", {"inputs": [tensor()], "id": "7"}, april)
    written = question.write(Answered(rows, april))
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
    chosen = {"inputs": [tensor()], "outputs": [{"name": "scores"}]}
    (only,) = infer("shop", chosen, april).write(Answered(rows, april))["outputs"]
    assert only["name"] == "scores"
    question = infer("shop", {"inputs": [tensor()], "outputs": [{"name": "score"}]}, april)
    with pytest.raises(Refused, match=r"outputs: 'score'; expected some of .*, scores"):
        question.write(Answered(rows, april))


def test_metadata_say_what_is_read(april) -> None:
    about = about_model("shop", april)
    assert about["versions"] == [april.id]
    assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    outputs = {one["name"]: (one["datatype"], one["shape"]) for one in about["outputs"]}
    assert outputs["prediction"] == outputs["reason"] == ("BYTES", [-1])
    assert outputs["scores"] == ("FP64", [-1, 2]) and outputs["answered"] == ("BOOL", [-1])
    answered = Answered(april.sample, april)
    written = infer("shop", {"inputs": [tensor()]}, april).write(answered)["outputs"]
    assert {one["name"]: one["datatype"] for one in written} == {
        name: kind for name, (kind, _) in outputs.items()
    }


def test_columns_of_numbers_are_of_a_type_of_numbers() -> None:
    usual = {"texts": ("text",), "numbers": ("price",), "kind": "class"}
    other: Any = SimpleNamespace(**usual)
    price = tensor(name="price", data=[1, 2.5])
    for kind in ("FP32", "INT64", "UINT8"):
        payload = {"inputs": [tensor(), price | {"datatype": kind}]}
        assert infer("shop", payload, other).table["price"] == [1, 2.5]
    for kind in ("BYTES", "BOOL", "FP33"):
        with pytest.raises(Refused, match=f"'price' is '{kind}'; expected a number"):
            infer("shop", {"inputs": [tensor(), price | {"datatype": kind}]}, other)
