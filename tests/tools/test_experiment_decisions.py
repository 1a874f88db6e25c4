"""Promises and sets over random calibration rows, on forecasts of which all is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bhpeft_pyro.forecast import ClassForecast, RatingForecast
from tools.experiments import decisions
from tools.experiments.outcome import Outcome

N = 300


def of_classes(confidence: Tensor, wrong: Tensor) -> ClassForecast:
    """Three classes, of which the predicted one is wrong for some rows."""
    predicted = torch.arange(len(confidence)) % 3
    rest = ((1 - confidence) / 2).unsqueeze(1).expand(-1, 3).clone()
    probabilities = rest.scatter(1, predicted.unsqueeze(1), confidence.unsqueeze(1))
    labels = (predicted + wrong.long()) % 3
    return ClassForecast.from_draws(probabilities[None], labels=labels)


def of_ratings(sd: float = 1.0) -> RatingForecast:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(N, generator=generator)
    return RatingForecast.from_draws(torch.zeros(1, N), torch.full((1, N), sd), labels=labels)


def outcome(**forecasts: Any) -> Outcome:
    named = {name.replace("_", " "): forecast for name, forecast in forecasts.items()}
    return Outcome({"task": "news", "rows": 400}, named)


CONFIDENCE = torch.linspace(0.4, 0.99, N, dtype=torch.float64)


def test_what_is_always_right_is_answered() -> None:
    """Wrong below a confidence of 0.7 alone."""
    test = of_classes(CONFIDENCE, CONFIDENCE < 0.7)
    scores = decisions.promise(outcome(validation=test, test=test))
    lines = {(score.table, score.by): score.values for score in scores}
    right = (CONFIDENCE >= 0.7).double().mean().item()
    here = lines["news: a promise of 5%", "200"]
    assert here["broken"] <= 0.2 and here["error"] <= 0.06
    assert right - 0.1 <= here["answered"] <= right + 0.1
    assert lines["news: a promise of 10%", "200"]["answered"] >= here["answered"]
    assert lines["news: a promise of 5%", "200"]["answered"] > 0
    assert {by for _, by in lines} == {"100", "200"}  # not more than there are rows


def test_nothing_is_promised_where_everything_is_wrong() -> None:
    test = of_classes(CONFIDENCE, torch.ones(N).bool())
    for score in decisions.promise(outcome(test=test)):
        assert score.values == {"broken": 0.0, "answered": 0.0}


def test_novelty_beside_each_uncertainty() -> None:
    """Of p-values that are known: the AUROC is the share of pairs, and 5 % are false alarms."""
    grid = torch.arange(1, N + 1, dtype=torch.float64) / N
    test = replace(of_classes(CONFIDENCE, torch.zeros(N).bool()), novelty=grid)
    strange = replace(of_classes(CONFIDENCE, torch.zeros(N).bool()), novelty=grid / 4)
    here, there = decisions.novelty(outcome(validation=test, test=test, to_films=strange))
    assert (here.table, there.table) == ("news, false alarms", "news, to films")
    assert here.values == {"flagged": pytest.approx(0.05)}
    assert there.values["flagged"] == pytest.approx(0.2)
    assert there.values["AUROC novelty"] == pytest.approx(0.875, abs=0.01)
    assert there.values["AUROC confidence"] == pytest.approx(0.5)
    assert "AUROC epistemic" not in there.values  # a point has none
    assert decisions.novelty(outcome(test=replace(test, novelty=None))) == []


def test_sets_and_intervals_cover_what_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(N, generator=generator) > CONFIDENCE
    (classes, *_), ratings = (
        decisions.sets(outcome(test=test)) for test in (of_classes(CONFIDENCE, wrong), of_ratings())
    )
    assert 0.87 <= classes.values["coverage"] <= 0.97
    assert 0.85 <= classes.values["coverage of the worst class"] <= classes.values["coverage"]
    assert 1 <= classes.values["size"] <= 3
    for score in ratings:
        assert score.values["coverage"] == pytest.approx(0.9, abs=0.03)
        assert score.values["size"] == pytest.approx(2 * 1.645, abs=0.3)
    (wide, _) = decisions.sets(outcome(test=of_ratings(sd=9.0)))  # whatever the forecast's sds
    assert wide.values["coverage"] == ratings[0].values["coverage"]
