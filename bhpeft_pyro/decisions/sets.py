"""Sets of classes and intervals of ratings with coverage, by conformal prediction.

A set of level 0.9 has the observed class in it for at least 90% of texts like the calibration rows
of the promise (`Posterior.promise`), on average over such rows, whatever the forecasts are worth
(Vovk et al. 2005, "Algorithmic learning in a random world"). Poor ones have larger sets.

* Classes: by class (Mondrian). A class is in the set unless its probability is lower than for most
  calibration rows *of this class*, so that each class is covered and not only all together.
* Choices, whose places are no classes: all together.
* Ratings: the residual is measured in predictive sds, so that intervals are wide where the forecast
  is uncertain. They end at the ends of the scale.

Nothing is drawn at random: ties count as inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..base.checks import few, warn
from ..base.values import Inside, checked_call
from ..errors import ConfigError, DataError
from ..forecast.base import digits

if TYPE_CHECKING:
    from ..forecast.base import Forecast
    from .promises import Promise

__all__ = ["covering", "intervals_of", "sets_of"]

_ROUNDING = 1e-9  # (1 - 0.9) * 10 is a little below 1


@checked_call
def sets_of(forecast: Forecast, level: Inside, empty: bool) -> list[list[Any]]:
    """N lists of classes, by name, or of choices by number; see the module.

    Args:
        forecast: of classes or choices, under a promise.
        level: the coverage.
        empty: let a set be empty, where no class is as probable as usual. Otherwise it has the most
            probable one.

    Raises:
        ConfigError: the forecast has no calibration rows, or is not of classes or choices.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(40), max_steps=9, progress=False)
    >>> posterior = posterior.promise(tiny_examples(200, seed=1), error=0.2)
    >>> sets_of(posterior.predict(["w5 w20"]), 0.5, empty=False)
    [['0']]
    """
    promised = check_coverage(forecast.promised, level, "sets", ("class", "choice"))
    made: Any = forecast
    count = made.probabilities.shape[1]
    names = made.label_names
    scores, labels = (promised.calibration[name].numpy() for name in ("miss", "label"))
    misses = 1 - made.probabilities.double().numpy()
    if promised.kind == "choice":
        inside = (misses <= _largest(scores, level)) & made.choices.numpy()
    else:
        _say_classes(labels, level, names)
        inside = misses <= [_largest(scores[labels == k], level) for k in range(count)]
    if not empty:
        inside[np.arange(len(inside)), misses.argmin(1)] |= ~inside.any(1)
    return [[name for name, there in zip(names, row, strict=True) if there] for row in inside]


@checked_call
def intervals_of(forecast: Forecast, level: Inside) -> tuple[Tensor, Tensor]:
    """Ends (N,), (N,) of intervals of ratings; see the module.

    Raises:
        ConfigError: the forecast has no calibration rows, or is not of ratings.
        DataError: there are too few calibration rows for this level; says how many would do.
    """
    promised = check_coverage(forecast.promised, level, "intervals", ("rating",))
    made: Any = forecast
    residuals, sds = (promised.calibration[name].numpy() for name in ("residual", "sd"))
    width = _largest(np.abs(residuals) / sds, level) * made.sd.double()
    mean, ends = made.mean.double(), made.scale
    if ends == (None, None):
        return mean - width, mean + width
    return (mean - width).clamp(*ends), (mean + width).clamp(*ends)


def check_coverage(
    promised: Promise | None,
    level: float,
    what: str = "level",
    kinds: Sequence[str] = ("class", "choice", "rating"),
) -> Promise:
    """The promise, if there are sets or intervals of a level under it.

    Raises:
        ConfigError: there is no promise, or it is of another kind.
        DataError: there are too few calibration rows for intervals.
    """
    if promised is None:
        raise ConfigError(
            f"{what}: the forecast has no calibration rows; expected one that was made after "
            "posterior.promise(calibration), in the way that this promise is for"
        )
    if promised.kind not in kinds:
        raise ConfigError(
            f"{what}: got a forecast of kind {promised.kind!r}; expected "
            f"{' or '.join(map(repr, kinds))}"
        )
    if promised.kind == "rating" and promised.rows < (fewest := _rows_needed(level)):
        raise DataError(
            f"level={level:g}: {promised.rows} calibration rows; expected at least {fewest}"
        )
    return promised


def covering(forecast: Forecast, level: float) -> dict[str, list[Any]]:
    """Columns with sets or intervals, whichever the forecast has, as plain values by row.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(40), max_steps=9, progress=False)
    >>> posterior = posterior.promise(tiny_examples(200, seed=1), error=0.2)
    >>> covering(posterior.predict(["w5 w20"]), 0.5)
    {'set_50': [['0']]}
    """
    named = f"{100 * level:g}"
    if forecast.promised is not None and forecast.promised.kind == "rating":
        ends = zip(("from", "to"), intervals_of(forecast, level), strict=True)
        return {f"{name}_{named}": digits(end) for name, end in ends}
    return {f"set_{named}": sets_of(forecast, level, empty=False)}


def _largest(scores: np.ndarray, level: float) -> float:
    """The largest score that is inside a set: of n calibration rows the k-th smallest, with
    k = level (n + 1) rounded up; infinite if there are fewer rows."""
    k = max(1, math.ceil(level * (len(scores) + 1) - _ROUNDING))
    return math.inf if k > len(scores) else float(np.sort(scores)[k - 1])


def _rows_needed(level: float) -> int:
    """The fewest calibration rows with which anything can be left out at a level."""
    return math.ceil(1 / (1 - level) - _ROUNDING) - 1


def _say_classes(labels: np.ndarray, level: float, names: Any) -> None:
    """Warn of classes with too few calibration rows to be left out of any set."""
    counts = [int((labels == k).sum()) for k in range(len(names))]
    fewest = _rows_needed(level)
    rare = [f"{name!r} ({n})" for name, n in zip(names, counts, strict=True) if n < fewest]
    if rare:
        warn(
            f"level={level:g}: {few(rare)} have fewer than {fewest} calibration rows, so they are "
            "in every set"
        )
