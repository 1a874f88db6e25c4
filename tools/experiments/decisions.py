"""What promises, sets and novelty are worth, from the forecasts of one fit.

The labelled test rows of a run stand for the population. Calibration rows are drawn from them with
replacement, many times, so the error of the population, and its coverage, are known exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bhpeft_pyro.decisions.promises import Promise, calibration_of
from bhpeft_pyro.decisions.sets import intervals_of, sets_of
from bhpeft_pyro.decisions.thresholds import ALL, by_error
from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.forecast.metrics import ood_auroc
from bhpeft_pyro.prediction.predict import AnyForecast

from .outcome import Outcome
from .scores import Score

__all__ = ["novelty", "promise", "sets"]

ROWS = (100, 200, 400, 1000)
"""Calibration rows, as far as there are so many test rows."""
ERRORS, CONFIDENCE = (0.05, 0.1), 0.9
TOLERANCE = 1.5
"""Distance up to which a rating is right."""
LEVEL = 0.9
FALSE_ALARMS = 0.05
_SPLITS, _SETS = 40, 10  # draws of calibration rows, for each seed: 200 and 50 of five


def promise(outcome: Outcome, errors: Sequence[float] = ERRORS) -> list[Score]:
    """For each error and number of calibration rows: how often a promise is broken, and what share
    is answered. Texts unlike the learnt ones are left to people, where the novelty of the test rows
    is known."""
    test, task = outcome.forecasts["test"], outcome.facts["task"]
    tolerance = TOLERANCE if isinstance(test, RatingForecast) else None
    chance, wrong = _sureness(test, tolerance), test.wrong(tolerance)
    made = []
    for error in errors:
        for rows in _sizes(len(test)):
            drawn = [*_draws(len(test), rows, _SPLITS)]
            thresholds = [_threshold(chance[i], wrong[i], error) for i in drawn]
            here = _kept(chance, wrong, thresholds, error)
            made.append(Score(f"{task}: a promise of {error:.0%}", here, str(rows)))
    return made


def _sureness(forecast: AnyForecast, tolerance: float | None) -> Tensor:
    """(N,) `chance_right`; `ALL`, which is never answered, of texts unlike the learnt ones."""
    chance = forecast.chance_right(tolerance)
    return chance if forecast.novelty is None else chance.masked_fill(forecast.unlike(), ALL)


def _threshold(chance: Tensor, wrong: Tensor, error: float) -> float | None:
    like = chance > ALL
    return by_error(chance[like], wrong[like], error, CONFIDENCE)


def sets(outcome: Outcome) -> list[Score]:
    """Coverage and size of sets of classes or choices, and of intervals of ratings."""
    test, task = outcome.forecasts["test"], outcome.facts["task"]
    made = []
    for rows in _sizes(len(test)):
        coverage, sizes = torch.zeros(len(test)).double(), torch.zeros(len(test)).double()
        for drawn in _draws(len(test), rows, _SETS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of classes with few calibration rows
                covered, size = _covered(replace(test, promised=_promised(test, drawn)))
            coverage += covered / _SETS
            sizes += size / _SETS
        values = {"coverage": coverage.mean().item(), "size": sizes.mean().item()}
        if _kind(test) == "class":
            labels = test.observed()
            by_class = (coverage[labels == k].mean().item() for k in labels.unique())
            values["coverage of the worst class"] = min(by_class)
        made.append(Score(f"{task}: sets or intervals of {LEVEL:.0%}", values, str(rows)))
    return made


def novelty(outcome: Outcome) -> list[Score]:
    """How well novelty tells rows of other kinds from test rows, beside each uncertainty: AUROC,
    and what is flagged where at most 5 % of rows like the learnt ones are."""
    test, learnt = outcome.forecasts["test"], str(outcome.facts["rows"])
    made = []
    for name, other in outcome.forecasts.items():
        if name == "validation":
            continue
        values = {}
        if test.novelty is not None:
            values["flagged"] = other.unlike(FALSE_ALARMS).double().mean().item()
        if name != "test":
            kinds = ("novelty",) * (test.novelty is not None) + test.measures
            for by in kinds:
                if by in ("novelty", "total", "confidence", "aleatoric") or other.epistemic.any():
                    values[f"AUROC {by}"] = ood_auroc(test, other, by=by)
        if values:
            shown = "false alarms" if name == "test" else name
            made.append(Score(f"{outcome.facts['task']}, {shown}", values, learnt))
    return made


def _sizes(count: int) -> list[int]:
    """Numbers of calibration rows; all rows if there are few."""
    return [rows for rows in ROWS if rows <= count] or [count]


def _kind(forecast: AnyForecast) -> str:
    if isinstance(forecast, RatingForecast):
        return "rating"
    return "class" if getattr(forecast, "choices", None) is None else "choice"


def _draws(count: int, rows: int, draws: int) -> Iterator[Tensor]:
    """Rows that are drawn with replacement."""
    generator = torch.Generator().manual_seed(rows)
    return (torch.randint(count, (rows,), generator=generator) for _ in range(draws))


def _kept(
    chance: Tensor, wrong: Tensor, thresholds: list[float | None], error: float
) -> dict[str, float]:
    """Of a population, how often the error is above the promised one, and what is answered."""
    broken, answered, errors = [], [], []
    for threshold in thresholds:
        above = torch.zeros_like(wrong) if threshold is None else chance > threshold
        realised = (wrong & above).sum().item() / max(int(above.sum()), 1)
        broken.append(float(realised > error))
        answered.append(above.double().mean().item())
        if above.any():
            errors.append(realised)
    values = {"broken": _mean(broken), "answered": _mean(answered)}
    return values | ({"error": _mean(errors)} if errors else {})


def _promised(forecast: AnyForecast, rows: Tensor) -> Promise:
    """A promise that answers everything, with these calibration rows."""
    kind = _kind(forecast)
    kept = {name: values[rows] for name, values in calibration_of(forecast, kind).items()}
    return Promise(
        kind=kind,
        error=ERRORS[0],
        confidence=CONFIDENCE,
        answer_unlike=True,
        unlike=0,
        rows=len(rows),
        answered=0,
        wrong=0,
        method=forecast.method,
        round="",
        calibration=kept,
    )


def _covered(forecast: Any) -> tuple[Tensor, Tensor]:
    """(N,) whether the label is in the set or interval, and (N,) its size."""
    if isinstance(forecast, RatingForecast):
        lower, upper = intervals_of(forecast, LEVEL)
        labels = forecast.observed()
        return ((lower <= labels) & (labels <= upper)).double(), upper - lower
    made = sets_of(forecast, LEVEL, empty=False)
    pairs = zip(forecast.named(forecast.observed()), made, strict=True)
    covered = torch.tensor([label in chosen for label, chosen in pairs]).double()
    return covered, torch.tensor([len(chosen) for chosen in made]).double()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
