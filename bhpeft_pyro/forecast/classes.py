"""Forecasts of classes, of stars, and of one choice of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import one_hot
from torch.special import entr

from ..data.labels import numbered_names, read_classes
from ..errors import DataError, LikelihoodError
from .base import Forecast, Labels, digits
from .metrics import aurc, calibration_bins

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
        label_names: names of the C classes; "0", "1" and so on by default. The numbers of choices.
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
    label_names: Sequence[Any] = ()
    choices: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        classes = self.probabilities.shape[1]
        names = range(classes) if self.choices is not None else self.label_names
        names = names or numbered_names(classes)
        if len(names) != classes:
            raise DataError(f"label_names={names}: expected {classes}, one for each class")
        object.__setattr__(self, "label_names", names)
        if self.labels is not None:
            labels = self.labels.long()
            if not ((labels == self.labels) & (labels >= 0) & (labels < classes)).all():
                raise DataError(f"labels: expected numbers of classes, 0 to {classes - 1}")
            object.__setattr__(self, "labels", labels)

    @classmethod
    def from_draws(
        cls, probabilities: Tensor, *, keep_samples: bool = False, **known: Any
    ) -> ClassForecast:
        """The mixture of S draws' probabilities (S, N, C), each summing to one over C.

        `known` are labels, texts, label_names and choices.

        Raises:
            LikelihoodError: `probabilities` are none.
            DataError: `labels` are not N numbers of classes.
        """
        draws = probabilities.detach().cpu()
        sums = draws.double().sum(-1)
        tolerance = 1e-4 + 2 * torch.finfo(draws.dtype).eps  # bfloat16 is right to 2 digits only
        # Written so that a NaN is refused too.
        if draws.dim() != 3 or not ((draws >= 0).all() and ((sums - 1).abs() <= tolerance).all()):
            raise LikelihoodError(
                "probabilities must be (S, N, C), >= 0 and sum to one over C, got values of shape "
                f"{tuple(draws.shape)} from {draws.min():.4g} and sums in {sums.min():.4g}.."
                f"{sums.max():.4g} (logits need a softmax first)"
            )
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
        return cls.from_moments(
            first + shift,
            first_entropy + entropy_shift / count,
            (square / count - shift.square()).clamp(min=0).sum(-1),
            dtype=torch.promote_types(draws.dtype, torch.float32),
            draws=count,
            samples=draws.clone() if keep_samples else None,
            **known,
        )

    @classmethod
    def from_moments(
        cls,
        mean: Tensor,
        aleatoric: Tensor,
        variance: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        draws: int = 1,
        **known: Any,
    ) -> ClassForecast:
        """Of random probabilities the mean (N, C), the mean entropy (N,) and the variance (N,),
        all float64; what is kept of them has another `dtype`."""
        total = entropy(mean)
        # Entropy is concave, so a negative difference can only be rounding.
        moments = (mean, total, aleatoric, (total - aleatoric).clamp(min=0), variance)
        names = ("probabilities", "total", "aleatoric", "epistemic", "variance")
        known |= {name: value.to(dtype) for name, value in zip(names, moments, strict=True)}
        return cls(draws=draws, **known)

    @classmethod
    def mixed(cls, components: Sequence[ClassForecast]) -> ClassForecast:
        """The equal-weight mixture of forecasts of the same examples, by equally many draws."""
        first = components[0]
        if len(components) == 1:
            return first
        of_each = torch.stack([component.probabilities.double() for component in components])
        mean = {
            name: torch.stack([getattr(each, name).double() for each in components]).mean(0)
            for name in ("total", "aleatoric", "epistemic", "variance")
        }
        mixed = of_each.mean(0)
        total = entropy(mixed)
        between = (total - mean["total"]).clamp(min=0)
        mean |= {"probabilities": mixed, "total": total, "between": between}
        mean["epistemic"] += between
        mean["variance"] += (of_each - mixed).square().sum(-1).mean(0)
        changes: dict[str, Any] = {k: v.to(first.probabilities) for k, v in mean.items()}
        if kept := [each.samples for each in components if each.samples is not None]:
            changes["samples"] = torch.cat(kept)
        return replace(first, **changes, draws=len(components) * first.draws, promised=None)

    def with_labels(self, labels: Labels) -> ClassForecast:
        """This forecast with other observed labels: names of classes, numbers of choices, or a
        tensor of indices.

        >>> draws = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])
        >>> forecast = ClassForecast.from_draws(draws, label_names=["bad", "good"])
        >>> forecast.with_labels(["good", "bad"]).labels
        tensor([1, 0])
        """
        if self.choices is None and not (isinstance(labels, Tensor) and labels.dtype != torch.bool):
            cells = [cell.item() if hasattr(cell, "item") else cell for cell in labels]
            labels = read_classes(cells, "labels", self.label_names)
        return super().with_labels(labels)

    def __len__(self) -> int:
        return self.probabilities.shape[0]

    @property
    def label(self) -> Tensor:
        """(N,) the most probable class."""
        return self.probabilities.argmax(-1)

    @property
    def predicted(self) -> list[Any]:
        """N most probable classes by name, or choices by number."""
        return self.named(self.label)

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

        The temperature T in [1/100, 100] minimises the NLL of softmax(log p / T) in the forecast
        `validation` of labelled examples that were not learnt; p is the mean of the draws, so all
        of the new forecast's uncertainty is aleatoric. T above 1 makes it less confident.

        >>> sure = ClassForecast.from_draws(torch.tensor([[[0.98, 0.02]] * 4]), labels=[0, 0, 0, 1])
        >>> round(sure.tempered(sure)[0].confidence[0].item(), 2)  # 3 of 4 are right
        0.75
        """
        logs, labels, end = validation.log_probabilities, validation.observed(), math.log(100.0)

        def nll(log_temperature: float) -> float:  # convex in 1/T, so there is one minimum
            scaled = (logs / math.exp(log_temperature)).log_softmax(-1)
            return -scaled.gather(1, labels[:, None]).mean().item()

        best = minimize_scalar(nll, bounds=(-end, end), method="bounded", options={"xatol": 1e-9})
        temperature = math.exp(best.x)
        scaled = (self.log_probabilities / temperature).softmax(-1).to(self.probabilities.dtype)
        kept = ("labels", "texts", "label_names", "choices", "novelty", "nearest")
        known = {name: getattr(self, name) for name in kept}
        return ClassForecast.from_draws(scaled[None], **known), temperature

    def loss(self, labels: Tensor) -> Tensor:
        return (self.label != labels).double()

    def chance_right(self, tolerance: float | None = None) -> Tensor:
        return self.confidence.double()

    def nlls(self, labels: Labels | None = None) -> Tensor:
        return -self.log_probabilities.gather(1, self.observed(labels)[:, None])[:, 0]

    def scores(self) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score  # slow to import

        labels, probabilities = self.observed(), self.probabilities.double()
        truth = one_hot(labels, probabilities.shape[1]).double()
        bins = calibration_bins(self.confidence, self.label == labels)
        by_class = [
            calibration_bins(*column).expected_error
            for column in zip(probabilities.T, truth.T, strict=True)
        ]
        return {
            "accuracy": accuracy_score(labels.numpy(), self.label.numpy()),
            "f1": f1_score(labels.numpy(), self.label.numpy(), average="macro"),
            "nll": self.nlls().mean().item(),
            "brier": (probabilities - truth).square().sum(-1).mean().item(),
            "ece": bins.expected_error,
            "classwise_ece": sum(by_class) / len(by_class),
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

    def named(self, labels: Tensor) -> list[Any]:
        return [self.label_names[number] for number in labels.tolist()]

    def _predicted(self) -> dict[str, list[Any]]:
        return {"prediction": self.predicted, "probability": digits(self.confidence)}

    def _headline(self) -> tuple[str, str]:
        what = "classes" if self.choices is None else "choices"
        size = f"{len(self)} examples, {self.probabilities.shape[1]} {what}, {self.draws} draws"
        return size, f"mean confidence {self.confidence.mean():.3f}"


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dim, with 0 log 0 = 0."""
    return entr(probabilities).sum(-1)
