"""How good a forecast is: right, well calibrated, unsure where it is wrong, and better than the
simplest forecast of all, such as always the most frequent class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from .base import Forecast, Labels

__all__ = [
    "CalibrationBins",
    "aurc",
    "calibration_bins",
    "compared",
    "evaluate",
    "ood_auroc",
    "rejection_curve",
    "scored",
]

BINS = 15
_CLEAR = 2.0  # standard errors, above which a difference is not chance
FRACTIONS = tuple(step / 10 for step in range(10))
MEANINGS = {
    "accuracy": "share correct; higher is better",
    "hamming": "share of wrong labels; lower is better",
    "f1": "macro F1; higher is better",
    "f1_micro": "F1 of all labels together; higher is better",
    "nll": "in nats; lower is better",
    "brier": "squared probability error; lower is better",
    "ece": "calibration error; lower is better",
    "classwise_ece": "the same by class; lower is better",
    "mce": "largest calibration gap; lower is better",
    "aurc": "area under risk-coverage; lower is better",
    "mutual_information": "mean epistemic uncertainty in nats",
    "mse": "mean squared error; lower is better",
    "mae": "mean absolute error; lower is better",
    "crps": "continuous ranked score; lower is better",
    "coverage_90": "labels in the 90 % interval; 0.9 is ideal",
}


def evaluate(forecast: Forecast, labels: Labels | None = None) -> dict[str, float]:
    """All metrics of a forecast against `labels` (default: the forecast's own).

    `MEANINGS` has a line for each. Classes (of multiple choice, positions): `brier` is summed over
    classes, so 0 to 2; `ece` and `mce` (Naeini et al. 2015) and `classwise_ece` (Kull et al. 2019)
    have 15 equal bins; `aurc` is ranked by confidence.

    Several labels: `accuracy` is the share of texts of which every label is right; macro `f1` is
    over the labels that occur; `nll` and `mutual_information` are summed over labels, taken one by
    one; `brier` and `ece` are of the probabilities that a text has a label; `aurc` is of the share
    of wrong labels, ranked by total uncertainty.

    Ratings: `aurc` is of the squared error, ranked by total uncertainty. Under a likelihood that is
    not Normal, `nll` is exact for the forecast's own labels, `crps` and `coverage_90` are of draws.

    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]])
    >>> scores = evaluate(ClassForecast.from_draws(draws), [0, 0])
    >>> scores["accuracy"], round(scores["brier"], 2), round(scores["ece"], 2)
    (0.5, 0.4, 0.4)
    """
    return (forecast if labels is None else forecast.with_labels(labels)).scores()


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """M equal bins of confidence, from (m - 1)/M, exclusive, to m/M, inclusive.

    Attributes:
        edges: (M + 1,) ends of the bins.
        count: (M,) number of examples; where it is 0, the two below are 0 as well.
        confidence: (M,) their mean confidence.
        accuracy: (M,) the share of them that was right.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_error(self) -> float:
        """ECE, the mean over examples of `|accuracy - confidence|` in their bin."""
        gap = (self.accuracy - self.confidence).abs()
        return ((gap * self.count).sum() / self.count.sum()).item()

    @property
    def maximum_error(self) -> float:
        """MCE, the largest `|accuracy - confidence|` of a bin."""
        return (self.accuracy - self.confidence).abs().max().item()


def calibration_bins(
    confidence: Tensor | Sequence[float], correct: Tensor | Sequence[float], bins: int = BINS
) -> CalibrationBins:
    """Sort (N,) confidences, and whether predictions were right, into bins (Guo et al. 2017); an
    error of scikit-learn's unless these are finite, as many, and at least one.

    >>> calibration_bins([0.75, 1.0], [True, False], bins=2).expected_error
    0.375
    """
    confidence, correct = _columns(confidence, correct)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = torch.bucketize(confidence, edges[1:-1])
    count = index.bincount(minlength=bins).double()
    total = count.clamp(min=1)  # 0 / 1 in an empty bin
    return CalibrationBins(
        edges,
        count,
        index.bincount(confidence, minlength=bins) / total,
        index.bincount(correct, minlength=bins) / total,
    )


def aurc(loss: Tensor | Sequence[float], uncertainty: Tensor | Sequence[float]) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017); smaller is better.

    The mean, over k = 1..N, of the mean `loss` (N,) of the k most certain examples. Examples that
    are equally certain count as if in random order. Under the 0-1 loss 1 - AURC is the area under
    the accuracy-rejection curve (AUARC; Nadeem, Zucker and Hanczar 2009).

    >>> aurc([0.0, 1.0], [0.1, 0.5])
    0.25
    """
    return _kept_risk(*_columns(loss, uncertainty)).mean().item()


def rejection_curve(
    forecast: Forecast,
    labels: Labels | None = None,
    *,
    by: str = "total",
    fractions: Sequence[float] | Tensor = FRACTIONS,
) -> tuple[Tensor, Tensor]:
    """Quality of what is kept when the least certain are rejected (BH-PEFT's rejection curve).

    Returns:
        The rejected fractions (K,) and, of the examples kept, accuracy, share of right labels or
        MSE (K,). At least one example is kept; equally certain ones count as if in random order.

    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]])
    >>> rejection_curve(ClassForecast.from_draws(draws), [0, 1], fractions=[0.0, 0.5])[1].tolist()
    [0.5, 1.0]
    """
    rejected = torch.as_tensor(fractions, dtype=torch.float64)
    if not ((rejected >= 0) & (rejected < 1)).all():
        raise ConfigError(f"fractions={fractions} must be shares of at least 0 and below 1")
    loss = forecast.loss(forecast.observed(labels))
    risk = _kept_risk(*_columns(loss, forecast.uncertainty(by)))
    # 0.29 * 100 is a little below 29.
    kept = len(forecast) - (rejected * len(forecast) + 1e-9).floor().long()
    score = risk[kept - 1]
    return rejected, 1 - score if forecast.higher_is_better else score


def ood_auroc(inside: Forecast, outside: Forecast, *, by: str = "epistemic") -> float:
    """How well uncertainty recognises strange examples: the AUROC of `outside` against `inside`.

    The probability that an example from outside the training distribution is less certain than
    one from inside it (ties count half); 0.5 is no better than chance. Both are of the same kind.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    uncertainty = torch.cat([each.uncertainty(by).double() for each in (inside, outside)])
    strange = torch.arange(len(uncertainty)) >= len(inside)
    return float(roc_auc_score(strange.numpy(), uncertainty.numpy()))


def macro_f1(truth: NDArray[np.int_], guessed: NDArray[np.int_]) -> float:
    """Mean F1 = 2 TP / (2 TP + FP + FN) of 0 or 1 (N, K), over the columns that are ever 1; 0 if
    there are none. scikit-learn takes a single column for two classes."""
    occurs = (truth + guessed).sum(0)
    by_column = 2 * (truth * guessed).sum(0)[occurs > 0] / occurs[occurs > 0]
    return float(by_column.mean()) if len(by_column) else 0.0


def _columns(*columns: Tensor | Sequence[float]) -> list[Tensor]:
    """(N,) columns of finite numbers in double precision."""
    from sklearn.utils import check_array  # slow to import

    numbers = np.stack([np.asarray(column, dtype=float) for column in columns])
    return [*torch.from_numpy(check_array(numbers))]


def _kept_risk(loss: Tensor, uncertainty: Tensor) -> Tensor:
    """(N,) mean loss of the k most certain examples, k = 1..N."""
    values, group = uncertainty.unique(return_inverse=True)
    # On average, random order gives each example of a tie the tie's mean loss.
    size = group.bincount(minlength=len(values))
    shared = (group.bincount(loss, minlength=len(values)) / size).repeat_interleave(size)
    return shared.cumsum(0) / torch.arange(1, len(loss) + 1)


def scored(forecast: Forecast, known: Tensor) -> str:
    """The quality of a forecast with labels, beside that of the simplest one by the labels `known`;
    better is a difference of more than two standard errors.

    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]]])
    >>> print(scored(ClassForecast.from_draws(draws, labels=[0, 1, 1, 0]), torch.ones(9)))
    accuracy 1.000 ± 0.000 on 4 held-out rows (always the most frequent class: 0.500); not \
clearly better than that (by 0.500 ± 0.289): label more rows, or try another backbone
    """
    loss = forecast.loss(forecast.observed())
    simplest, other = forecast.simplest(known)
    (value, error), least = mean_and_error(loss), other.mean().item()
    if forecast.higher_is_better:
        value, least = 1 - value, 1 - least
    said = (
        f"{forecast.quality} {value:.3f} ± {error:.3f} on {len(forecast)} held-out rows "
        f"({simplest}: {least:.3f})"
    )
    gain, error = mean_and_error(other - loss)
    if gain > _CLEAR * error:
        return said
    return (
        f"{said}; not clearly better than that (by {gain:.3f} ± {error:.3f}): label more rows, or "
        "try another backbone"
    )


def standard_errors(forecast: Forecast) -> dict[str, float]:
    """Standard errors, over examples, of the accuracy or the MSE, and of the NLL: `accuracy_se` or
    `mse_se`, and `nll_se`. None of a single example.

    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = torch.tensor([[[0.9, 0.1]] * 4])
    >>> standard_errors(ClassForecast.from_draws(draws, labels=[0, 1, 0, 1]))["accuracy_se"]
    0.28867513459481287
    """
    rating = not forecast.higher_is_better
    values = forecast.loss(forecast.observed()) if rating else forecast.wrong().double()
    columns = {"mse_se" if rating else "accuracy_se": values, "nll_se": forecast.nlls()}
    errors = {name: mean_and_error(of)[1] for name, of in columns.items()}
    return {name: error for name, error in errors.items() if not math.isnan(error)}


def mean_and_error(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """The mean of (N,) values and its standard error, NaN of a single one.

    >>> mean_and_error([0.0, 1.0, 0.0, 1.0])
    (0.5, 0.28867513459481287)
    """
    values = torch.as_tensor(values, dtype=torch.double)
    mean = values.mean().item()
    if len(values) < 2:
        return mean, math.nan
    return mean, (values.var() / len(values)).sqrt().item()


def compared(after: Forecast, before: Forecast) -> str:
    """The difference between two forecasts of the same examples, with its standard error: one of
    more than two of these is called better or worse, any other may be chance.

    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> draws = (torch.tensor([[[1 - p, p]] * 9 + [[p, 1 - p]]]) for p in (0.9, 0.6))
    >>> sure, unsure = (ClassForecast.from_draws(each, labels=[1] * 10) for each in draws)
    >>> compared(sure, unsure).split(", ")[1]
    'NLL -0.226 ± 0.179 (no significant difference)'
    """
    truth = after.observed()
    up = -1 if after.higher_is_better else 1
    parts = []
    for what, sign, values in (
        (after.quality, up, after.loss(truth) - before.loss(truth)),
        ("NLL", 1, after.nlls() - before.nlls()),
    ):
        mean, error = mean_and_error(values)
        verdict = "no significant difference"
        if abs(mean) > _CLEAR * error:
            verdict = "better" if mean < 0 else "worse"
        parts.append(f"{what} {round(sign * mean, 3) + 0.0:+.3f} ± {error:.3f} ({verdict})")
    return ", ".join(parts)
