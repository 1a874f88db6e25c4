"""Forecasts of classes, of stars, and of one choice of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import one_hot

from ..base.checks import boolean, check
from ..data.labels import by_name
from ..errors import DataError, LikelihoodError
from .base import Forecast, Labels, as_labels, check_names, check_shape, digits
from .dirichlet import entropy, expected_entropy
from .metrics import aurc, calibration_bins, macro_f1

_CHUNK = 32  # draws in double precision at a time


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClassForecast(Forecast):
    """A forecast of classes, stars or multiple choice; made by `from_draws`.

    Attributes:
        probabilities: (N, C) E[p], the mean of the draws' probabilities (never of their logits).
        total: (N,) entropy of E[p] in nats.
        aleatoric: (N,) mean of the draws' entropies.
        epistemic: (N,) total - aleatoric, the mutual information of label and weights (BALD,
            Houlsby et al. 2011).
        between: (N,) the part of `epistemic` that is disagreement between the components of a
            mixture; None if there is only one.
        variance: (N,) variance over the draws of the class probabilities, summed over classes:
            the uncertainty that BH-PEFT ranks by.
        draws: S.
        samples: (S, N, C) the draws, if kept.
        label_names: names of the C classes, or None.
        choices: (N, C) bool, True where a choice exists; None except for multiple choice.

    >>> draws = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.5, 0.5]]])
    >>> forecast = ClassForecast.from_draws(draws)  # the draws disagree on the first example only
    >>> [round(value, 3) for value in forecast.epistemic.tolist()]
    [0.368, 0.0]
    >>> forecast.flag(0.5)
    tensor([0])
    """

    quality: ClassVar[str] = "accuracy"
    measures: ClassVar[tuple[str, ...]] = (*Forecast.measures, "variance", "confidence")
    _by_draw: ClassVar[tuple[str, ...]] = ("samples",)

    probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variance: Tensor
    draws: int
    between: Tensor | None = None
    samples: Tensor | None = None
    label_names: Sequence[str] | None = None
    choices: Tensor | None = None

    def __post_init__(self) -> None:
        count, classes = self.probabilities.shape
        self._check_rows(whole=True)
        check_names(self.label_names, classes, "classes")
        check(self.choices, Tensor | None, "choices", "a tensor (N, C)")
        if self.labels is not None:
            labels = self.labels.long()
            object.__setattr__(self, "labels", labels)
            if not ((labels >= 0) & (labels < classes)).all():
                ends = f"{int(labels.min())}..{int(labels.max())}"
                raise DataError(f"labels must lie in 0..{classes - 1}, got {ends}")
        if self.choices is not None:
            check_shape("choices", self.choices, (count, classes))
            choices = self.choices.detach().cpu().bool()
            object.__setattr__(self, "choices", choices)
            if (self.probabilities[~choices] != 0).any():
                raise LikelihoodError("probabilities must be 0 where choices is False")
            if self.labels is not None and not choices.gather(1, self.labels[:, None]).all():
                raise DataError("labels name a choice that does not exist (choices is False)")

    @classmethod
    def from_draws(
        cls,
        probabilities: Tensor,
        *,
        labels: Tensor | Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        choices: Tensor | None = None,
        keep_samples: bool = False,
    ) -> ClassForecast:
        """The mixture of S draws' probabilities (S, N, C), each summing to one over C.

        Raises:
            LikelihoodError: `probabilities` is not such a tensor.
            DataError: what goes with it does not match it.
        """
        draws, keep_samples = _checked(probabilities), boolean("keep_samples", keep_samples)
        first = draws[0].double()
        first_entropy = entropy(first)
        # Sums are of differences from the first draw: exactly zero where all draws agree.
        shift, square = torch.zeros_like(first), torch.zeros_like(first)
        entropy_shift = torch.zeros_like(first_entropy)
        for chunk in draws.split(_CHUNK):
            difference = chunk.double() - first
            shift += difference.sum(0)
            square += difference.square().sum(0)
            entropy_shift += (entropy(chunk.double()) - first_entropy).sum(0)
        count = len(draws)
        shift /= count
        aleatoric = first_entropy + entropy_shift / count
        variance = (square / count - shift.square()).clamp(min=0).sum(-1)
        dtype = torch.promote_types(draws.dtype, torch.float32)
        samples = draws.clone() if keep_samples else None
        about: dict[str, Any] = {"texts": texts, "label_names": label_names, "choices": choices}
        measures = _measures(first + shift, aleatoric, variance, dtype)
        return cls(**measures, draws=count, samples=samples, labels=as_labels(labels), **about)

    @classmethod
    def from_dirichlet(
        cls, probabilities: Tensor, precision: Tensor, **about: Any
    ) -> ClassForecast:
        """Of probabilities that have a Dirichlet distribution, in closed form: (N, C) its mean, and
        (N,) the sum of its parameters. `about` are labels, texts, label_names, choices.

        Raises:
            LikelihoodError: `probabilities` or `precision` is not such a tensor.
            DataError: what goes with them does not match them.
        """
        mean = _checked(probabilities[None])[0].double()
        if precision.shape != mean.shape[:1] or not (precision > 0).all():
            raise LikelihoodError(
                f"precision must be {len(mean)} positive numbers, one for each example, got shape "
                f"{tuple(precision.shape)}, the least {precision.amin():.4g}"
            )
        variance = (mean * (1 - mean)).sum(-1) / (precision.double() + 1)
        measures = _measures(mean, expected_entropy(mean, precision), variance, torch.float32)
        return cls(**measures, draws=1, **about | {"labels": as_labels(about.get("labels"))})

    @classmethod
    def mixed(cls, components: Sequence[ClassForecast]) -> ClassForecast:
        """The equal-weight mixture of forecasts of the same examples, by equally many draws."""
        first = components[0]
        if len(components) == 1:
            return first

        def mean(values: Iterable[Tensor]) -> Tensor:
            return sum(values, start=torch.zeros(())) / len(components)

        def mean_of(name: str) -> Tensor:
            return mean(getattr(component, name).double() for component in components)

        probabilities = mean_of("probabilities")
        squares = [(each.probabilities - probabilities).square().sum(-1) for each in components]
        total = entropy(probabilities)
        between = (total - mean_of("total")).clamp(min=0)
        values = {
            "probabilities": probabilities,
            "total": total,
            "aleatoric": mean_of("aleatoric"),
            "epistemic": between + mean_of("epistemic"),
            "between": between,
            "variance": mean_of("variance") + mean(squares),
        }
        changes: dict[str, Any] = {k: v.to(first.probabilities) for k, v in values.items()}
        if kept := [each.samples for each in components if each.samples is not None]:
            changes["samples"] = torch.cat(kept)
        return replace(first, **changes, draws=len(components) * first.draws, promised=None)

    def with_labels(self, labels: Labels) -> ClassForecast:
        """This forecast with other observed labels: names if the classes have them, or indices.
        Where names are numbers or truth values, so are labels; a tensor of numbers has indices.

        >>> draws = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])
        >>> forecast = ClassForecast.from_draws(draws, label_names=["bad", "good"])
        >>> forecast.with_labels(["good", "bad"]).labels
        tensor([1, 0])
        """
        names = self.label_names
        if names is not None and not (isinstance(labels, Tensor) and labels.dtype != torch.bool):
            plain = labels.tolist() if hasattr(labels, "tolist") else labels
            check(plain, Iterable, "labels", "a label for each example")
            plain = [cell.item() if isinstance(cell, np.generic) else cell for cell in plain]
            cells = by_name(plain, None, names)
            if unknown := [cell for cell in cells if isinstance(cell, str) and cell not in names]:
                raise DataError(f"labels: {unknown[0]!r} is not one of {tuple(names)}")
            labels = [names.index(cell) if isinstance(cell, str) else cell for cell in cells]
        given = as_labels(labels)
        if given is not None and given.dtype == torch.bool:
            expected = "numbers of classes" if names is None else f"some of {tuple(names)}"
            raise DataError(f"labels are truth values; expected {expected}")
        return replace(self, labels=given)

    def __len__(self) -> int:
        return self.probabilities.shape[0]

    @property
    def label(self) -> Tensor:
        """(N,) the most probable class."""
        return self.probabilities.argmax(-1)

    @property
    def predicted(self) -> list[str] | list[int]:
        """N most probable classes by name, or by number if they have no names."""
        labels: list[int] = self.label.tolist()
        return labels if self.label_names is None else [self.label_names[k] for k in labels]

    @property
    def confidence(self) -> Tensor:
        """(N,) the probability of the most probable class."""
        return self.probabilities.amax(-1)

    @property
    def log_probabilities(self) -> Tensor:
        """(N, C) float64 logs of `probabilities`; -inf only for choices that do not exist."""
        logs = self.probabilities.double().clamp_min(torch.finfo(torch.float32).tiny).log()
        return logs if self.choices is None else logs.masked_fill(~self.choices, -torch.inf)

    def tempered(self, validation: ClassForecast) -> tuple[ClassForecast, float]:
        """This forecast after temperature scaling, and the temperature (Guo et al. 2017).

        The temperature T in [1/100, 100] minimises the NLL of softmax(log p / T) in a forecast of
        labelled examples that the network was not trained on, p the mean of the draws; so all of
        the new forecast's uncertainty is aleatoric. T above 1 makes forecasts less confident.

        >>> sure = ClassForecast.from_draws(torch.tensor([[[0.98, 0.02]] * 4]), labels=[0, 0, 0, 1])
        >>> round(sure.tempered(sure)[0].confidence[0].item(), 2)  # 3 of 4 are right
        0.75
        """
        check(validation, ClassForecast, "validation", "a ClassForecast")
        logs, labels, end = validation.log_probabilities, validation.observed(), math.log(100.0)

        def nll(log_temperature: float) -> float:  # convex in 1/T, so there is one minimum
            scaled = (logs / math.exp(log_temperature)).log_softmax(-1)
            return -scaled.gather(1, labels[:, None]).mean().item()

        best = minimize_scalar(nll, bounds=(-end, end), method="bounded", options={"xatol": 1e-9})
        temperature = math.exp(best.x)
        scaled = (self.log_probabilities / temperature).softmax(-1).to(self.probabilities.dtype)
        kept = ("labels", "texts", "label_names", "choices", "novelty", "nearest")
        options: dict[str, Any] = {name: getattr(self, name) for name in kept}
        return replace(ClassForecast.from_draws(scaled[None]), **options), temperature

    def loss(self, labels: Tensor) -> Tensor:
        return (self.label != labels).double()

    def chance_right(self, tolerance: float | None = None) -> Tensor:
        return self.confidence.double()

    def nlls(self, labels: Labels | None = None) -> Tensor:
        return -self.log_probabilities.gather(1, self.observed(labels)[:, None])[:, 0]

    def scores(self) -> dict[str, float]:
        labels, probabilities = self.observed(), self.probabilities.double()
        classes = probabilities.shape[1]
        truth, guessed = (one_hot(each, classes).double() for each in (labels, self.label))
        correct = self.label == labels
        bins = calibration_bins(self.confidence, correct)
        by_class = zip(probabilities.T, truth.T, strict=True)
        classwise = [calibration_bins(p, is_it).expected_error for p, is_it in by_class]
        return {
            "accuracy": correct.double().mean().item(),
            "f1": macro_f1(truth, guessed),
            "nll": self.nlls().mean().item(),
            "brier": (probabilities - truth).square().sum(-1).mean().item(),
            "ece": bins.expected_error,
            "classwise_ece": sum(classwise) / classes,
            "mce": bins.maximum_error,
            "aurc": aurc(self.loss(labels), self.uncertainty("confidence")),
            "mutual_information": self.epistemic.double().mean().item(),
        }

    def simplest(self, known: Tensor) -> tuple[str, Tensor]:
        if self.choices is not None:
            return "guessing", 1 - 1 / self.choices.sum(-1).double()
        counts = known.long().bincount()
        most = (counts == counts.max()).nonzero()  # several, if as many rows have another class
        losses = (self.observed() != most).double()
        return "always the most frequent class", losses[losses.mean(1).argmin()]

    def summary(self) -> dict[str, list[Any]]:
        return self._summary(prediction=self.predicted, probability=digits(self.confidence))

    def to_dataset(self) -> Dataset:
        """Rows of text and label (where known), prediction, confidence, uncertainties and E[p].

        With `label_names`, label and prediction are `ClassLabel` columns.
        """
        columns = self._columns("confidence", *Forecast.measures, "variance", "probabilities")
        columns["prediction"] = self.label.tolist()
        dataset = Dataset.from_dict(columns)
        if self.label_names is None:
            return dataset
        named = {"label", "prediction"} & columns.keys()
        feature = ClassLabel(names=list(self.label_names))
        # Not by a cast, which shows a progress bar.
        features = Features({**dataset.features, **dict.fromkeys(named, feature)})
        return Dataset.from_dict(columns, features)

    def _facts(self) -> tuple[str, str]:
        what = "classes" if self.choices is None else "choices"
        size = f"{len(self)} examples, {self.probabilities.shape[1]} {what}, {self.draws} draws"
        return size, f"mean confidence {self.confidence.mean():.3f}"


def _measures(
    mean: Tensor, aleatoric: Tensor, variance: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """What a forecast keeps of draws, in this precision: E[p], its entropy and the parts of that,
    and the variance."""
    total = entropy(mean)
    values = {
        "probabilities": mean,
        "total": total,
        "aleatoric": aleatoric,
        # Entropy is concave, so a negative difference can only be rounding.
        "epistemic": (total - aleatoric).clamp(min=0),
        "variance": variance,
    }
    return {name: value.to(dtype) for name, value in values.items()}


def _checked(draws: Tensor) -> Tensor:
    """The draws (s, N, C) on the CPU, if they are probabilities at all."""
    check(draws, Tensor, "probabilities", "a tensor (S, N, C)")
    shape = tuple(draws.shape)
    if not draws.is_floating_point() or len(shape) != 3 or min(shape) < 1 or shape[2] < 2:
        raise LikelihoodError(
            "probabilities must be a floating (S, N, C) tensor with S, N >= 1 and C >= 2, "
            f"got {draws.dtype} of shape {shape}"
        )
    draws = draws.detach().cpu()
    sums = draws.double().sum(-1)
    tolerance = 1e-4 + 2 * torch.finfo(draws.dtype).eps  # bfloat16 is right to 2 digits only
    # Written so that a NaN is refused too.
    if not (draws >= 0).all() or not ((sums - 1).abs() <= tolerance).all():
        raise LikelihoodError(
            "probabilities must be >= 0 and sum to one over the last dim, got values from "
            f"{draws.min():.4g} and sums in {sums.min():.4g}..{sums.max():.4g} "
            "(logits need a softmax first)"
        )
    return draws
