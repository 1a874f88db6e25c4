"""How good a forecast is in one number: with its standard error, and beside the simplest forecast
of all, such as always the most frequent class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Forecast
from .classes import ClassForecast
from .metrics import loss_of, nlls
from .multilabel import LabelsForecast
from .ratings import RatingForecast

_OF_RATINGS = "mean squared error"
_CLEAR = 2.0  # standard errors, above which a difference is not chance


@dataclass(frozen=True)
class Score:
    """The quality of a forecast.

    Attributes:
        name: "accuracy", "share of right labels" or "mean squared error".
        value: over the examples.
        error: its standard error.
        simplest: what the value is compared with, in words.
        other: the value of the simplest forecast.
        clear: whether the forecast is better than that by more than two standard errors of the
            difference on the same examples.
        examples: how many, in words.
    """

    name: str
    value: float
    error: float
    simplest: str
    other: float
    clear: bool
    examples: str

    @classmethod
    def of(cls, forecast: Forecast, known: Tensor) -> Score:
        """The score of a forecast with labels, where the simplest forecast is made of the labels
        `known`: of their most frequent class, or their mean.

        >>> draws = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]]])
        >>> print(Score.of(ClassForecast.from_draws(draws, labels=[0, 1, 1, 0]), torch.ones(9)))
        accuracy 1.000 ± 0.000 on 4 held-out rows (always the most frequent class: 0.500); not \
clearly better than that: label more rows, or try another backbone
        """
        labels = forecast.observed()
        loss = loss_of(forecast, labels)
        if isinstance(forecast, ClassForecast) and forecast.choices is not None:
            simplest, other = "guessing", 1 - 1 / forecast.choices.sum(-1).double()
        elif isinstance(forecast, ClassForecast):
            most = known.long().bincount().argmax()
            simplest, other = "always the most frequent class", (labels != most).double()
        elif isinstance(forecast, LabelsForecast):
            usual = known.double().mean(0) > 0.5
            simplest, other = "always the usual labels", (labels.bool() != usual).double().mean(-1)
        else:
            simplest = "always the mean rating"
            other = (labels.double() - known.double().mean()).square()
        gain, error = mean_and_error(other - loss, forecast.rows)
        value, own = mean_and_error(loss, forecast.rows)
        less = other.mean().item()
        count = f"{len(forecast)} held-out {'rows' if forecast.rows is None else 'words'}"
        if isinstance(forecast, RatingForecast):
            name = _OF_RATINGS
        else:
            name, value, less = forecast.quality, 1 - value, 1 - less
        return cls(name, value, own, simplest, less, gain > _CLEAR * error, count)

    def __str__(self) -> str:
        said = (
            f"{self.name} {self.value:.3f} ± {self.error:.3f} on {self.examples} "
            f"({self.simplest}: {self.other:.3f})"
        )
        if self.clear:
            return said
        return f"{said}; not clearly better than that: label more rows, or try another backbone"


def mean_and_error(values: Tensor, rows: Tensor | None = None) -> tuple[float, float]:
    """The mean of (N,) values and its standard error; values of the same row count as dependent.

    >>> mean_and_error(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    (0.5, 0.28867513459481287)
    """
    values = values.double()
    mean = values.mean()
    away = values - mean
    if rows is not None:
        _, rows = rows.unique(return_inverse=True)
        away = torch.zeros(int(rows.max()) + 1, dtype=away.dtype).index_add(0, rows, away)
    if (count := len(away)) < 2:
        return mean.item(), math.nan
    error = (away.square().sum() * count / (count - 1)).sqrt() / len(values)
    return mean.item(), error.item()


def compared(after: Forecast, before: Forecast) -> str:
    """The difference between two forecasts of the same examples, which may be chance."""
    truth = after.observed()
    # A loss, or one minus it.
    name, up = (_OF_RATINGS, 1) if isinstance(after, RatingForecast) else (after.quality, -1)
    parts = []
    for what, sign, values in (
        (name, up, loss_of(after, truth) - loss_of(before, truth)),
        ("NLL", 1, nlls(after) - nlls(before)),
    ):
        mean, error = mean_and_error(values, after.rows)
        verdict = "no significant difference"
        if abs(mean) > _CLEAR * error:
            verdict = "better" if mean < 0 else "worse"
        parts.append(f"{what} {round(sign * mean, 3) + 0.0:+.3f} ± {error:.3f} ({verdict})")
    return ", ".join(parts)
