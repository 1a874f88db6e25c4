"""Tasks for Label Studio, checked by its own library where there is one, and what comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from pools import pool, session_in

from bhpeft_pyro.errors import BHPEFTWarning, DataError
from bhpeft_pyro.integrations.label_studio import from_export, labelling_config, to_tasks
from bhpeft_pyro.review import labelled

KINDS = ("class", "labels", "rating", "choice")


def annotation(value: dict[str, Any] | None, who: Any = 1, **more: Any) -> dict[str, Any]:
    result = [] if value is None else [{"from_name": "label", "value": value}]
    return {"completed_by": who, "result": result, "was_cancelled": False, **more}


def exported(*annotations: dict[str, Any], key: str = "t0") -> list[dict[str, Any]]:
    return [{"data": {"key": key}, "annotations": [*annotations]}]


@pytest.mark.parametrize("kind", KINDS)
def test_label_studio_accepts_the_interface_and_the_tasks(kind):
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    made = interface(labelling_config(pool(kind=kind)))
    made.validate()
    for task in to_tasks(pool(kind=kind)):
        assert made.validate_task({"data": task["data"]})
        (prediction,) = task["predictions"]
        of_task = made.load_task(task["data"])
        assert of_task.validate_prediction(prediction, return_errors=True) == []


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_have_the_prediction_its_score_and_the_uncertainty(kind):
    first, second = json.loads(json.dumps(to_tasks(pool(2, kind)), allow_nan=False))
    assert first["data"]["text"] == "text 0" and first["data"]["key"] == "t0"
    assert (
        first["data"]["epistemic"] == 0.25
        and first["data"]["reason"] == "little learnt from such texts"
    )
    assert second["data"]["text"] == "text 1"
    (prediction,) = first["predictions"]
    (result,) = prediction["result"]
    expected = {
        "class": ({"choices": ["delivery"]}, 0.5),
        "labels": ({"choices": []}, 0.8 * 0.5 * 0.7),
        "rating": ({"number": 3.21}, 1 / (1 + 0.75**0.5)),
        "choice": ({"choices": ["delivery"]}, 0.5),
    }
    value, score = expected[kind]
    assert result["value"] == value and prediction["score"] == pytest.approx(score)
    assert prediction["model_version"] == "r1"
    names = {tag.get("name") for tag in ElementTree.fromstring(labelling_config(pool(kind=kind)))}
    assert {result["from_name"], result["to_name"]} <= names
    assert ("choices" in first["data"]) == (kind == "choice")


def test_names_are_escaped_and_tasks_come_in_the_order_of_the_pool():
    texts = pool(3)
    odd = replace(texts.items["t0"], options=('"<&>', "b", "c"), texts=("one", "two"))
    changed = replace(texts, items={"t0": odd}, order=("t0",))
    root = ElementTree.fromstring(labelling_config(changed))
    assert [tag.get("value") for tag in root.iter("Choice")] == ['"<&>', "b", "c"]
    assert [tag.get("value") for tag in root.iter("Text")] == ["$text", "$pair"]
    assert to_tasks(changed)[0]["data"]["pair"] == "two"
    ordered = replace(texts, order=("t2", "t0"))
    assert [task["data"]["key"] for task in to_tasks(ordered)] == ["t2", "t0"]


@pytest.mark.parametrize(
    ("kind", "value", "label"),
    [
        ("class", {"choices": ["praise"]}, "praise"),
        ("choice", {"choices": ["billing"]}, "billing"),
        ("labels", {"choices": ["praise", "billing"]}, ["billing", "praise"]),
        ("labels", {"choices": []}, []),
        ("rating", {"number": 3.5}, 3.5),
        ("rating", {"rating": 4}, 4),
    ],
)
def test_annotations_are_labels(kind, value, label):
    (decision,) = from_export(exported(annotation(value)), pool(kind=kind))
    assert (decision.action, decision.label) == ("label", label)
    (row,) = labelled([decision], pool(kind=kind))
    assert row["text"] == "text 0" and row["label"] == label and row["person"] == "1"


@pytest.mark.parametrize("number", ["good", 7, float("nan")])
def test_a_rating_is_a_number_of_the_scale(number):
    beyond = replace(pool(kind="rating"), scale=(0.0, 5.0), limited=True)
    with pytest.raises(DataError, match="rating"):
        from_export(exported(annotation({"number": number})), beyond)


def test_several_annotators_skips_and_notes(tmp_path):
    note = {"from_name": "note", "value": {"text": ["odd"]}}
    praise, billing = {"choices": ["praise"]}, {"choices": ["billing"]}
    bo = annotation(praise, {"id": 2, "email": "bo@example.org"})
    bo["result"].append(note)
    tasks = [
        *exported(annotation(praise), bo),
        *exported(annotation(praise), annotation(billing, 2), key="t1"),
        *exported(annotation(None), key="t2"),
        *exported(annotation(praise, was_cancelled=True), key="t3"),
        *exported(annotation(praise), key="of another table"),
    ]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks), encoding="utf-8-sig")  # as an editor may save it
    with pytest.warns(BHPEFTWarning, match="export: 1 of 5 tasks are of no text of this pool's"):
        decisions = from_export(file, pool())
    assert [one.action for one in decisions] == ["label"] * 4 + ["none", "skip"]
    (row,) = labelled(decisions, pool())
    names = ("text", "label", "person", "note")
    assert [row[name] for name in names] == ["text 0", "praise", "1, bo@example.org", "odd"]
    session = session_in(tmp_path)
    session.keep(decisions)
    assert session.names == ["1", "2", "bo@example.org"] and session.labels == 1


@pytest.mark.parametrize(
    ("export", "problem"),
    [
        ([{"text": "text 0", "label": "praise"}], "task 0 has no 'data'; expected Label Studio's"),
        (exported(annotation({"choices": ["other"]})), "'other' is not one of"),
        (exported(annotation(None), key="of another table"), "1 of 1 tasks are of no text"),
        ("no.json", "cannot be read as JSON"),
    ],
)
def test_what_is_no_export_of_these_tasks_is_refused(export, problem):
    with pytest.raises(DataError, match=problem):
        from_export(export, pool())


def test_a_task_without_annotations_is_not_decided() -> None:
    assert from_export([{"data": {"key": "t0"}, "annotations": None}], pool()) == []


def test_an_annotation_without_a_result_or_an_author() -> None:
    nobody = annotation(None, completed_by=None) | {"result": None, "completed_by": None}
    said = annotation({"choices": ["praise"]})
    said["result"].append({"from_name": "note", "value": {"text": "why not"}})
    none, noted = from_export(exported(nobody, said), pool())
    assert (none.action, none.person) == ("none", "") and noted.note == "why not"
