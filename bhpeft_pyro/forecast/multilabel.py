"""Forecasts of several labels per text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base.values import as_python
from ..data.labels import numbered_names, read_labels
from ..errors import DataError
from .base import Forecast, Labels, digits
from .classes import ClassForecast
from .metrics import aurc, calibration_bins, macro_f1

Measure = Literal["epistemic", "aleatoric", "total"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LabelsForecast(Forecast):
    """A forecast of several labels per text; made by `from_draws`.

    `total`, `aleatoric` and `epistemic` are sums over the K labels, of the entropies in nats that
    `by_label` has one by one: each pair of a text and a label is a forecast of two classes.

    Attributes:
        pairs: the forecast of the N K pairs, of the classes "has not" and "has".
        count: K.
        label_names: names of the K labels; "0", "1" and so on by default.
        threshold: () or (K,) the probability above which a label is predicted.

    >>> draws = torch.tensor([[[0.9, 0.2, 0.5]], [[0.9, 0.6, 0.5]]])  # 2 draws, 1 text, 3 labels
    >>> forecast = LabelsForecast.from_draws(draws, label_names=["sport", "money", "art"])
    >>> forecast.predicted
    [['sport']]
    >>> [round(value, 3) for value in forecast.by_label("epistemic")[0].tolist()]
    [0.0, 0.086, 0.0]
    """

    quality: ClassVar[str] = "share of right labels"
    _of_all: ClassVar[tuple[str, ...]] = ("threshold",)

    pairs: ClassForecast
    count: int
    label_names: Sequence[str] = ()
    threshold: Tensor = field(default_factory=lambda: torch.tensor(0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.label_names or numbered_names(self.count)
        object.__setattr__(self, "label_names", names)
        if self.labels is not None and not ((self.labels == 0) | (self.labels == 1)).all():
            raise DataError("labels must be 0 or 1, one for each label")

    @property
    def _labels_shape(self) -> tuple[int, ...]:
        return (len(self), self.count)

    @classmethod
    def from_draws(
        cls, probabilities: Tensor, *, keep_samples: bool = False, **known: Any
    ) -> LabelsForecast:
        """The mixture of S draws' probabilities (S, N, K) that a text has a label.

        `known` are labels, texts and label_names.

        Raises:
            LikelihoodError: `probabilities` are none.
            DataError: `labels` are not (N, K) numbers 0 or 1.
        """
        pairs = ClassForecast.from_draws(
            both(probabilities).flatten(1, 2), keep_samples=keep_samples
        )
        return cls(pairs=pairs, count=probabilities.shape[2], **known)

    @classmethod
    def mixed(cls, components: Sequence[LabelsForecast]) -> LabelsForecast:
        """The equal-weight mixture of forecasts of the same texts, by equally many draws."""
        pairs = ClassForecast.mixed([component.pairs for component in components])
        return replace(components[0], pairs=pairs, promised=None)

    def __len__(self) -> int:
        return len(self.pairs) // self.count

    @property
    def probabilities(self) -> Tensor:
        """(N, K) E[p], the mean of the draws' probabilities that a text has a label."""
        return self.pairs.probabilities[:, 1].reshape(-1, self.count)

    def by_label(self, measure: Measure) -> Tensor:
        """(N, K) the uncertainty of each label, in nats."""
        values: Tensor = getattr(self.pairs, measure)
        return values.reshape(-1, self.count)

    @property
    def total(self) -> Tensor:
        """(N,) entropy of E[p], summed over labels."""
        return self.by_label("total").sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        """(N,) mean of the draws' entropies, summed over labels."""
        return self.by_label("aleatoric").sum(-1)

    @property
    def epistemic(self) -> Tensor:
        """(N,) total - aleatoric."""
        return self.by_label("epistemic").sum(-1)

    @property
    def between(self) -> Tensor | None:
        """(N,) the part of `epistemic` that is disagreement between components, if known."""
        between = self.pairs.between
        return None if between is None else between.reshape(-1, self.count).sum(-1)

    @property
    def samples(self) -> Tensor | None:
        """(S, N, K) the draws, if kept."""
        draws = self.pairs.samples
        return None if draws is None else draws[..., 1].unflatten(1, (-1, self.count))

    @property
    def label(self) -> Tensor:
        """(N, K) bool, the labels that are more probable than the threshold."""
        return self.probabilities > self.threshold

    @property
    def predicted(self) -> list[list[str]]:
        """For each text the labels predicted, by name."""
        return self.named(self.label)

    def with_threshold(self, threshold: float | Sequence[float] | Tensor) -> LabelsForecast:
        """This forecast with another threshold for all labels, or one for each (K,)."""
        # In the precision of the probabilities, some of which may differ by little.
        values = torch.as_tensor(threshold, dtype=self.probabilities.dtype)
        return replace(self, threshold=values, promised=None)

    def with_labels(self, labels: Labels) -> LabelsForecast:
        """This forecast with other observed labels: for each text a list of names, or K numbers 0
        or 1."""
        if not isinstance(labels, Tensor):
            labels = read_labels([*as_python(labels)], "labels", self.label_names)
        return super().with_labels(labels)

    def best_threshold(self) -> Tensor:
        """(K,) thresholds that maximise each label's F1 on these texts; use them on other texts.

        They lie midway between probabilities, and have their precision; for a label that no text
        has it is 1.
        """
        truth, thresholds = self.observed().double(), self.probabilities.new_ones(self.count)
        for k in truth.any(0).nonzero().flatten().tolist():
            p, order = self.probabilities[:, k].sort(descending=True)
            has = truth[order, k]
            # F1 = 2 TP / (predicted + there are), if the most probable 1, 2, ... N have the label.
            f1 = 2 * has.cumsum(0) / (torch.arange(1, len(p) + 1) + has.sum())
            lower = torch.cat([p[1:], p.new_zeros(1)])
            best = int(f1.masked_fill(p == lower, -1.0).argmax())  # equal ones go together
            middle = (p[best] + lower[best]) / 2
            # It is rounded up where there is no number between.
            thresholds[k] = lower[best] if middle == p[best] else middle
        return thresholds

    def loss(self, labels: Tensor) -> Tensor:
        return (self.label != labels.bool()).double().mean(-1)

    def chance_right(self, tolerance: float | None = None) -> Tensor:
        p = self.probabilities.double()
        return torch.where(self.label, p, 1 - p).prod(-1)

    def nlls(self, labels: Labels | None = None) -> Tensor:
        by_label = self.pairs.nlls(self.observed(labels).flatten().long())
        return by_label.reshape(-1, self.count).sum(-1)

    def scores(self) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, hamming_loss  # slow to import

        labels, p = self.observed(), self.probabilities.double()
        truth, guessed = labels.numpy().astype(int), self.label.numpy().astype(int)
        return {
            "accuracy": accuracy_score(truth, guessed),
            "hamming": hamming_loss(truth, guessed),
            "f1": macro_f1(truth, guessed),
            "f1_micro": f1_score(truth.ravel(), guessed.ravel(), zero_division=0.0),
            "nll": self.nlls().mean().item(),
            "brier": (p - labels).square().mean().item(),
            "ece": calibration_bins(p.flatten(), labels.flatten()).expected_error,
            "aurc": aurc(self.loss(labels), self.total),
            "mutual_information": self.epistemic.double().mean().item(),
        }

    def simplest(self, known: Tensor) -> tuple[str, Tensor]:
        usual = known.double().mean(0) > 0.5
        return "always the usual labels", (self.observed().bool() != usual).double().mean(-1)

    def named(self, labels: Tensor) -> list[Any]:
        named = (zip(self.label_names, row, strict=True) for row in labels.int().tolist())
        return [[name for name, has in row if has] for row in named]

    def _predicted(self) -> dict[str, list[Any]]:
        names = self.label_names
        rows = [dict(zip(names, digits(row), strict=True)) for row in self.probabilities]
        return {"prediction": self.predicted, "probability": rows}

    def _headline(self) -> tuple[str, str]:
        size = f"{len(self)} texts, {self.count} labels, {self.pairs.draws} draws"
        return size, f"labels predicted per text {self.label.double().sum(-1).mean():.2f}"


def both(probabilities: Tensor) -> Tensor:
    """(..., 2) the probabilities that a text has not, and has, a label."""
    return torch.stack([1 - probabilities, probabilities], -1)
