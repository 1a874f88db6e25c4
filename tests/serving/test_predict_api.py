"""`/predict` has the shape of Text Embeddings Inference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bhpeft_pyro.serving.answers import Answer
from bhpeft_pyro.serving.engine import Answered, Refused
from bhpeft_pyro.serving.protocols import predict

ONE = [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]


def answered(served: Any, count: int, **scores: float) -> Answered:
    return Answered([Answer({"prediction": "good"}, scores)] * count, served)


@pytest.mark.parametrize(
    ("inputs", "texts", "listed"),
    [
        ("w5", ["w5"], False),
        (["w5"], ["w5"], True),
        (["w5", "w6"], ["w5", "w6"], True),  # a list of two texts is no pair
        (["w5", "w6", "w7"], ["w5", "w6", "w7"], True),
        ([["w5"], ["w6"]], ["w5", "w6"], True),
        (["w5", ["w6"]], ["w5", "w6"], True),
    ],
)
def test_texts_and_the_shape_of_their_answer(april, inputs, texts, listed) -> None:
    question = predict({"inputs": inputs, "parameters": {}}, april)
    assert question.table == {"text": texts} and not question.whole
    answer = question.write(answered(april, len(texts), good=0.75, bad=0.25))
    assert answer == ([ONE] * len(texts) if listed else ONE)


def test_pairs(april) -> None:
    columns = replace(april.posterior.columns, pair="answer_text", label="fits")
    pairs = replace(april, posterior=april.posterior.replace(columns=columns))
    question = predict({"inputs": [["w5", "w6"], ["w7", "w8"]]}, pairs)
    assert question.table == {"text": ["w5", "w7"], "answer_text": ["w6", "w8"]}
    for wrong in (["w5", "w6"], "w5", [["w5"]], [["w5", "w6", "w7"]]):
        with pytest.raises(Refused, match="expected a pair of texts"):
            predict({"inputs": wrong}, pairs)
    assert question.write(answered(pairs, 1)) == [[{"label": "fits", "score": "good"}]]


def test_details_and_truncation(april) -> None:
    question = predict({"inputs": "w5", "details": True, "truncate": False}, april)
    assert question.whole
    assert question.write(answered(april, 1, good=0.75)) == {
        "prediction": "good",
        "scores": {"good": 0.75},
        "round": april.id,
    }


def test_parameters_of_huggingface_hub(april) -> None:
    scores = {"good": 0.5, "bad": 0.3, "odd": 0.2}
    for top in (1, 2, 3, 5, None):
        parameters = {"top_k": top, "function_to_apply": "softmax"}
        question = predict({"inputs": ["w5"], "parameters": parameters}, april)
        ((*labels,),) = question.write(answered(april, 1, **scores))
        assert [label["label"] for label in labels] == [*scores][:top]
        question = predict({"inputs": "w5", "parameters": parameters, "details": True}, april)
        assert [*question.write(answered(april, 1, **scores))["scores"]] == [*scores][:top]
    assert predict({"inputs": "w5", "truncation_direction": "Right"}, april)


@pytest.mark.parametrize(
    ("kind", "does"), [("class", "softmax"), ("labels", "sigmoid"), ("rating", "none")]
)
def test_what_makes_scores_may_be_asked_for_as_it_is(kind, does) -> None:
    usual = {"kind": kind, "numbers": (), "texts": ("text",)}
    other: Any = SimpleNamespace(**usual)
    for applied in ("softmax", "sigmoid", "none"):
        payload = {"inputs": "w5", "parameters": {"function_to_apply": applied}}
        if applied == does:
            predict(payload, other)
        else:
            with pytest.raises(Refused, match=f"function_to_apply: got '{applied}'.*'{does}'"):
                predict(payload, other)


@pytest.mark.parametrize(
    "payload",
    [
        *(None, 3, "w5", [], {}, {"input": "w5"}),
        *({"inputs": wrong} for wrong in (None, 3, True, {}, [], [[]], "", " ", ["w5", ""])),
        *({"inputs": wrong} for wrong in (["w5", 3], [["w5", "w6"]], [[["w5"]]], "\ud800")),
        *({"inputs": "w5", name: "yes"} for name in ("details", "truncate", "raw_scores")),
        {"inputs": "w5", "raw_scores": True},
        {"inputs": "w5", "truncation_direction": "Left"},
        *({"inputs": "w5", "parameters": {"top_k": wrong}} for wrong in (0, -1, True, 1.5, "2")),
        *({"inputs": "w5", "parameters": wrong} for wrong in (3, [], {"top": 1})),
        *({"inputs": "w5", "parameters": {"function_to_apply": f}} for f in ("sigmoid", "none", 1)),
    ],
)
def test_what_is_no_question_is_refused(april, payload) -> None:
    with pytest.raises(Refused) as refused:
        predict(payload, april)
    assert refused.value.status == 422


def test_rounds_that_read_more_than_texts_point_to_tables(april) -> None:
    for change in ({"kind": "choice"}, {"numbers": ("price",)}):
        usual = {"kind": "class", "numbers": (), "texts": ("text",)}
        other: Any = SimpleNamespace(**usual | change)
        with pytest.raises(Refused, match="/invocations"):
            predict({"inputs": "w5"}, other)
