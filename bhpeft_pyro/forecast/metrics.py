"""How good a forecast is: right, well calibrated, and unsure where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.checks import BELOW_ONE, COUNT, check, check_memory
from ..errors import DataError
from .base import Forecast, Labels, as_numbers, check_shape
from .classes import ClassForecast
from .multilabel import LabelsForecast
from .ratings import RatingForecast

__all__ = [
    "CalibrationBins",
    "aurc",
    "calibration_bins",
    "coverage",
    "crps",
    "evaluate",
    "nlls",
    "ood_auroc",
    "rejection_curve",
]

BINS = 15
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
    "coverage_90": "labels in the 90 % interval; 0.9 is ideal (of counts more)",
}


def evaluate(forecast: Forecast, labels: Labels | None = None) -> dict[str, float]:
    """All metrics of a forecast against `labels` (default: the forecast's own).

    Classes: `accuracy`; `f1` (macro: over the classes that occur as label or prediction);
    `nll` of the mean probability; `brier` (Brier 1950: summed over classes, so 0 to 2);
    `ece` and `mce` (Naeini et al. 2015) and `classwise_ece` (Kull et al. 2019), all with 15 equal
    bins; `aurc` (Geifman and El-Yaniv 2017), ranked by confidence; and the mean
    `mutual_information`. For multiple choice a class is a position.

    Several labels: `accuracy`, the share of texts of which every label is right (subset accuracy);
    `hamming`, that of wrong labels; `f1` (macro: the mean over the labels that occur) and
    `f1_micro` (of all labels together), all at the forecast's threshold; `nll`, summed over labels
    taken one by one; `brier` and `ece` of the probabilities that a text has a label; `aurc` of the
    share of wrong labels, ranked by total uncertainty; `mutual_information`, summed over labels.

    Ratings: `mse` and `mae` of the mean; `nll` and `crps` of the mixture; and `coverage_90`, the
    share of labels within the 90 % interval. Under a likelihood that is not Normal, the `nll` is
    exact for the forecast's own labels, and `crps` and `coverage_90` are of draws.

    >>> draws = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]])
    >>> scores = evaluate(ClassForecast.from_draws(draws), [0, 0])
    >>> scores["accuracy"], round(scores["brier"], 2), round(scores["ece"], 2)
    (0.5, 0.4, 0.4)
    """
    check(forecast, Forecast, "forecast", "a forecast")
    if labels is not None:
        forecast = forecast.with_labels(labels)
    truth = forecast.observed()
    if isinstance(forecast, ClassForecast):
        return _evaluate_classes(forecast, truth)
    if isinstance(forecast, LabelsForecast):
        return _evaluate_labels(forecast, truth)
    assert isinstance(forecast, RatingForecast)
    error = forecast.mean.double() - truth.double()
    return {
        "mse": error.square().mean().item(),
        "mae": error.abs().mean().item(),
        "nll": nlls(forecast).mean().item(),
        "crps": crps(forecast, truth).mean().item(),
        "coverage_90": coverage(forecast, truth)[0],
    }


def nlls(forecast: Forecast, labels: Labels | None = None) -> Tensor:
    """(N,) NLL of each example, float64; their mean is the `nll` of `evaluate`.

    >>> nlls(ClassForecast.from_draws(torch.tensor([[[0.5, 0.5]]])), [0])
    tensor([0.6931], dtype=torch.float64)
    """
    check(forecast, Forecast, "forecast", "a forecast")
    if isinstance(forecast, ClassForecast):
        return -forecast.log_probabilities.gather(1, forecast.observed(labels)[:, None])[:, 0]
    if isinstance(forecast, LabelsForecast):
        pairs = nlls(forecast.pairs, forecast.observed(labels).flatten().long())
        return pairs.reshape(-1, forecast.count).sum(-1)
    assert isinstance(forecast, RatingForecast)
    return -forecast.log_prob(labels).double()


def _evaluate_classes(forecast: ClassForecast, labels: Tensor) -> dict[str, float]:
    probabilities = forecast.probabilities.double()
    classes = probabilities.shape[1]
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    guessed = torch.nn.functional.one_hot(forecast.label, classes).double()
    correct = forecast.label == labels
    bins = calibration_bins(forecast.confidence, correct)
    classwise = [
        calibration_bins(probabilities[:, k], one_hot[:, k]).expected_error for k in range(classes)
    ]
    return {
        "accuracy": correct.double().mean().item(),
        "f1": _macro_f1(one_hot, guessed),
        "nll": nlls(forecast, labels).mean().item(),
        "brier": (probabilities - one_hot).square().sum(-1).mean().item(),
        "ece": bins.expected_error,
        "classwise_ece": sum(classwise) / classes,
        "mce": bins.maximum_error,
        "aurc": aurc(loss_of(forecast, labels), forecast.uncertainty("confidence")),
        "mutual_information": forecast.epistemic.double().mean().item(),
    }


def _macro_f1(truth: Tensor, guessed: Tensor) -> float:
    """Mean F1 = 2 TP / (2 TP + FP + FN) of 0 or 1 (N, K), over the columns that are ever 1; 0 if
    there are none."""
    occurs = (truth + guessed).sum(0)
    found = 2 * (truth * guessed).sum(0)[occurs > 0] / occurs[occurs > 0]
    return found.mean().item() if len(found) else 0.0


def _evaluate_labels(forecast: LabelsForecast, labels: Tensor) -> dict[str, float]:
    truth, guessed = labels.double(), forecast.label.double()
    p, wrong = forecast.probabilities.double(), loss_of(forecast, labels)
    return {
        "accuracy": (wrong == 0).double().mean().item(),
        "hamming": wrong.mean().item(),
        "f1": _macro_f1(truth, guessed),
        "f1_micro": _macro_f1(truth.reshape(-1, 1), guessed.reshape(-1, 1)),
        "nll": nlls(forecast, labels).mean().item(),
        "brier": (p - truth).square().mean().item(),
        "ece": calibration_bins(p.flatten(), truth.flatten()).expected_error,
        "aurc": aurc(wrong, forecast.total),
        "mutual_information": forecast.epistemic.double().mean().item(),
    }


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """M equal bins of confidence, from above (m - 1)/M up to and with m/M.

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
    """Sort (N,) confidences, and whether predictions were right, into bins (Guo et al. 2017).

    >>> calibration_bins([0.75, 1.0], [True, False], bins=2).expected_error
    0.375
    """
    bins = COUNT("bins", bins)
    check_memory("bins", bins, 32)
    confidence, correct = _two_columns(confidence=confidence, correct=correct)
    if not ((confidence >= 0) & (confidence < 1 + 1e-3)).all():  # it may be rounded
        raise DataError("confidence: expected probabilities, from 0 to 1")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = torch.bucketize(confidence.contiguous(), edges[1:-1])
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
    are equally certain count as if in random order.
    """
    return _kept_risk(*_two_columns(loss=loss, uncertainty=uncertainty)).mean().item()


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

    >>> draws = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]])
    >>> rejection_curve(ClassForecast.from_draws(draws), [0, 1], fractions=[0.0, 0.5])[1].tolist()
    [0.5, 1.0]
    """
    truth = forecast.observed(labels)
    check(fractions, Iterable, "fractions", "a sequence of numbers")
    fractions = fractions.tolist() if isinstance(fractions, Tensor) else fractions
    fractions = [BELOW_ONE("fractions", fraction) for fraction in fractions]
    risk = _kept_risk(loss_of(forecast, truth), forecast.uncertainty(by))
    # 0.29 * 100 is a little below 29.
    kept = [len(forecast) - math.floor(f * len(forecast) + 1e-9) for f in fractions]
    score = risk[torch.tensor(kept, dtype=torch.long) - 1]
    if not isinstance(forecast, RatingForecast):
        score = 1 - score
    return torch.tensor(list(fractions), dtype=torch.float64), score


def ood_auroc(inside: Forecast, outside: Forecast, *, by: str = "epistemic") -> float:
    """How well uncertainty recognises strange examples: the AUROC of `outside` against `inside`.

    The probability that an example from outside the training distribution is less certain than
    one from inside it (ties count half); 0.5 is no better than chance.

    Raises:
        ConfigError: the forecasts are of different kinds, so their uncertainties have other units.
    """
    check(inside, Forecast, "inside", "a forecast")
    check(outside, type(inside), "outside", f"a {type(inside).__name__}, as inside is")
    known = inside.uncertainty(by).double().sort().values
    strange = outside.uncertainty(by).double().contiguous()
    below = [torch.searchsorted(known, strange, right=right) for right in (False, True)]
    return torch.stack(below).double().mean().item() / len(known)


def crps(forecast: RatingForecast, labels: Labels | None = None) -> Tensor:
    """(N,) continuous ranked probability score of the mixture of Normals (Grimit et al. 2006).

    In closed form: E|Y - y| - E|Y - Y'| / 2 with Y, Y' independent draws of the mixture; of
    `outcomes`, if there are any, the same over them. It has the unit of the ratings; smaller is
    better.
    """
    check(forecast, RatingForecast, "forecast", "a RatingForecast")
    truth = forecast.observed(labels)
    if (drawn := forecast.sorted_outcomes) is not None:
        count = drawn.shape[1]
        places = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
        away = (drawn - truth.double().unsqueeze(-1)).abs().mean(-1)
        return away - (drawn @ places) / count**2
    means, sds = forecast.means.double(), forecast.component_sds
    score = _mean_absolute(means - truth.double(), sds).mean(0)
    spread = torch.zeros_like(score)
    for mean, sd in zip(means, sds, strict=True):  # S passes over (S, N), never (S, S, N)
        spread += _mean_absolute(means - mean, torch.hypot(sds, sd)).mean(0)
    return score - spread / (2 * forecast.draws)


def coverage(
    forecast: RatingForecast, labels: Labels | None = None, *, level: float = 0.9
) -> tuple[float, float]:
    """The share of labels within the central interval of probability `level`, and its mean width.

    Both matter: a wide enough interval covers anything.

    >>> forecast = RatingForecast.from_draws(torch.zeros(1, 2), torch.ones(1, 2))
    >>> inside, width = coverage(forecast, [0.0, 5.0])
    >>> inside, round(width, 2)
    (0.5, 3.29)
    """
    check(forecast, RatingForecast, "forecast", "a RatingForecast")
    truth = forecast.observed(labels)
    lower, upper = forecast.interval(level)
    inside = (lower <= truth) & (truth <= upper)
    return inside.double().mean().item(), (upper - lower).double().mean().item()


def _mean_absolute(mean: Tensor, sd: Tensor) -> Tensor:
    """E|X| for X ~ Normal(mean, sd)."""
    ratio = mean / sd
    density = (-0.5 * ratio.square()).exp() / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * torch.erf(ratio / math.sqrt(2))


def _two_columns(**columns: Tensor | Sequence[float]) -> list[Tensor]:
    """Two (N,) columns of numbers in double precision."""
    found = [as_numbers(name, values).double() for name, values in columns.items()]
    for name, values in zip(columns, found, strict=True):
        check_shape(name, values, (found[0].numel(),))
    return found


def _kept_risk(loss: Tensor, uncertainty: Tensor) -> Tensor:
    """(N,) mean loss of the k most certain examples, k = 1..N."""
    values, group = uncertainty.unique(return_inverse=True)
    # On average, random order gives each example of a tie the tie's mean loss.
    size = group.bincount(minlength=len(values))
    shared = (group.bincount(loss.double(), minlength=len(values)) / size).repeat_interleave(size)
    return shared.cumsum(0) / torch.arange(1, len(loss) + 1)


def loss_of(forecast: Forecast, labels: Tensor) -> Tensor:
    """(N,) 0-1 loss of the predicted class, share of wrong labels, or squared error of the mean."""
    if isinstance(forecast, ClassForecast):
        return (forecast.label != labels).double()
    if isinstance(forecast, LabelsForecast):
        return (forecast.label != labels.bool()).double().mean(-1)
    assert isinstance(forecast, RatingForecast)
    return (forecast.mean.double() - labels.double()).square()
