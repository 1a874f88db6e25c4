"""From a forecast to plain answers: what a service says of each text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..forecast.base import digits
from ..prediction.predict import AnyForecast

__all__ = ["Answer", "answers_of"]


@dataclass(frozen=True)
class Answer:
    """What is said of a text.

    Attributes:
        said: the columns of `bhpeft predict`: the prediction; its probability, or for ratings the
            sd and the ends of the 90 % interval; the epistemic and aleatoric uncertainty, the
            novelty, the main reason to doubt it, if any, and whether it is answered under the
            promise, None if nothing is promised.
        scores: the probability of each class, label or choice by its name or number, the most
            probable first; empty for ratings.
    """

    said: dict[str, Any]
    scores: dict[str, float]


def answers_of(forecast: AnyForecast) -> list[Answer]:
    """An answer for each text that was predicted.

    >>> import torch
    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.25, 0.75]]])
    >>> (answer,) = answers_of(ClassForecast.from_draws(draws, label_names=["bad", "good"]))
    >>> answer.scores
    {'good': 0.75, 'bad': 0.25}
    >>> answer.said["prediction"], answer.said["reason"]
    ('good', 'people may differ')
    """
    table = forecast.table().drop(columns=["text", "label"], errors="ignore")
    rows: list[Any] = table.to_dict("records")
    return [Answer(*row) for row in zip(rows, _scores(forecast), strict=True)]


def _scores(forecast: AnyForecast) -> list[dict[str, float]]:
    probabilities: Any = getattr(forecast, "probabilities", None)
    if probabilities is None:
        return [{} for _ in range(len(forecast))]
    names: Any = getattr(forecast, "label_names", None) or range(probabilities.shape[1])
    choices = getattr(forecast, "choices", None)  # of which some texts have fewer
    counts = [len(names)] * len(forecast) if choices is None else choices.sum(1).tolist()
    scores = []
    for row, count in zip(probabilities, counts, strict=True):
        named = zip(map(str, names), digits(row[:count]), strict=False)
        scores.append(dict(sorted(named, key=lambda pair: -pair[1])))
    return scores
