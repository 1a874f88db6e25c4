"""What is said of a text, by kind of label."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.serving.answers import answers_of
from bhpeft_pyro.serving.engine import Answered


def test_classes_are_named_and_ordered() -> None:
    draws = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]])
    first, second = answers_of(ClassForecast.from_draws(draws, label_names=["a", "b", "c"]))
    assert first.scores == pytest.approx({"b": 0.5, "c": 0.3, "a": 0.2})
    assert [*first.scores] == ["b", "c", "a"] and [*second.scores] == ["a", "b", "c"]
    assert first.said["prediction"] == "b" and first.said["probability"] == pytest.approx(0.5)
    assert answers_of(ClassForecast.from_draws(draws))[0].scores.keys() == {"0", "1", "2"}
    (full,) = Answered([first], SimpleNamespace(id="5f0c", no_promise=None)).in_full
    assert full == first.said | {"scores": first.scores, "round": "5f0c"}
    (full,) = Answered([first], SimpleNamespace(id="5f0c", no_promise="none was made")).in_full
    assert full["answered"] is None and full["no_promise"] == "none was made"


def test_choices_that_do_not_exist_have_no_score() -> None:
    draws = torch.tensor([[[0.3, 0.7, 0.0], [0.1, 0.2, 0.7]]])
    there = torch.tensor([[True, True, False], [True, True, True]])
    first, second = answers_of(ClassForecast.from_draws(draws, choices=there))
    assert [*first.scores] == ["1", "0"] and [*second.scores] == ["2", "1", "0"]


def test_several_labels_and_ratings() -> None:
    labels = LabelsForecast.from_draws(torch.tensor([[[0.9, 0.6]]]), label_names=["x", "y"])
    (answer,) = answers_of(labels)
    assert answer.scores == pytest.approx({"x": 0.9, "y": 0.6})
    assert answer.said["prediction"] == ["x", "y"]
    (answer,) = answers_of(RatingForecast.from_draws(torch.tensor([[3.0]]), torch.tensor([[1.0]])))
    assert answer.scores == {}
    (full,) = Answered([answer], SimpleNamespace(id="r", no_promise=None)).in_full
    assert "scores" not in full
    assert answer.said["lower_90"] < answer.said["prediction"] == 3.0 < answer.said["upper_90"]
