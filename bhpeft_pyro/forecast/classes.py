"""Forecasts of classes, of stars, and of one choice of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import DataError, LikelihoodError
from .base import Forecast, as_labels, check_shape

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ClassAccumulator", "ClassForecast"]


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
            mixture; None if there is only one, or draws of all of them are pooled.
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

    measures: ClassVar[tuple[str, ...]] = (*Forecast.measures, "variance", "confidence")

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
        if self.label_names is not None and len(self.label_names) != classes:
            raise DataError(f"label_names has {len(self.label_names)} names for {classes} classes")
        if self.labels is not None:
            object.__setattr__(self, "labels", self.labels.long())
            if not ((self.labels >= 0) & (self.labels < classes)).all():
                raise DataError(
                    f"labels must lie in 0..{classes - 1}, "
                    f"got {int(self.labels.min())}..{int(self.labels.max())}"
                )
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
            DataError: `labels`, `texts`, `label_names` or `choices` do not match it.
        """
        accumulator = ClassAccumulator(keep_samples=keep_samples)
        accumulator.add(probabilities)
        return accumulator.forecast(
            labels=labels, texts=texts, label_names=label_names, choices=choices
        )

    @classmethod
    def mixed(cls, components: Sequence[ClassForecast]) -> ClassForecast:
        """The equal-weight mixture of forecasts of the same examples, by equally many draws.

        >>> sure = ClassForecast.from_draws(torch.tensor([[[0.9, 0.1]]]))
        >>> other = ClassForecast.from_draws(torch.tensor([[[0.1, 0.9]]]))
        >>> both = ClassForecast.mixed([sure, other])
        >>> bool(both.between == both.epistemic)
        True
        """
        first = components[0]
        if len(components) == 1:
            return first

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(each, name).double() for each in components])

        probabilities = stacked("probabilities").mean(0)
        total = _entropy(probabilities)
        between = (total - stacked("total").mean(0)).clamp(min=0)
        apart = stacked("probabilities").var(0, correction=0).sum(-1)
        values = {
            "probabilities": probabilities,
            "total": total,
            "aleatoric": stacked("aleatoric").mean(0),
            "epistemic": between + stacked("epistemic").mean(0),
            "between": between,
            "variance": stacked("variance").mean(0) + apart,
        }
        dtype = first.probabilities.dtype
        changes: dict[str, Any] = {name: value.to(dtype) for name, value in values.items()}
        return replace(first, **changes, draws=sum(each.draws for each in components))

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
        names = self.label_names
        return labels if names is None else [names[label] for label in labels]

    @property
    def confidence(self) -> Tensor:
        """(N,) the probability of the most probable class."""
        return self.probabilities.amax(-1)

    @property
    def log_probabilities(self) -> Tensor:
        """(N, C) float64 logs of `probabilities`; -inf only for choices that do not exist."""
        logs = self.probabilities.double().clamp_min(torch.finfo(torch.float32).tiny).log()
        return logs if self.choices is None else logs.masked_fill(~self.choices, -torch.inf)

    def to_dataset(self) -> Dataset:
        """Rows of text and label (where known), prediction, confidence, uncertainties and E[p].

        With `label_names`, label and prediction are `ClassLabel` columns.
        """
        from datasets import ClassLabel, Dataset, Features  # slow to import, and seldom needed

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

    def __repr__(self) -> str:
        kind = "classes" if self.choices is None else "choices"
        return (
            f"ClassForecast: {len(self)} examples, {self.probabilities.shape[1]} {kind}, "
            f"{self.draws} draws\n"
            f"  mean confidence {self.confidence.mean():.3f}\n"
            f"  mean uncertainty (nats) {self.total.mean():.4f} = "
            f"{self.aleatoric.mean():.4f} aleatoric + {self.epistemic.mean():.4f} epistemic"
        )


class ClassAccumulator:
    """Sums draws chunk by chunk, so that all (S, N, C) need never be in memory at once.

    Args:
        keep_samples: keep the draws too, as the forecast's `samples`.

    >>> accumulator = ClassAccumulator()
    >>> for _ in range(3):
    ...     accumulator.add(torch.full((2, 5, 4), 0.25))
    >>> accumulator.forecast().draws
    6
    """

    def __init__(self, *, keep_samples: bool = False) -> None:
        self._kept: list[Tensor] | None = [] if keep_samples else None
        self._draws = 0
        self._first: Tensor | None = None  # (N, C), the first draw

    def add(self, draws: Tensor) -> None:
        """Add (s, N, C): the (N, C) class probabilities under s more draws."""
        draws = _checked(draws, None if self._first is None else tuple(self._first.shape))
        values = draws.double()
        entropy = _entropy(values)
        if self._first is None:
            # Sums are of differences from the first draw: exactly zero where all draws agree.
            self._dtype = torch.promote_types(draws.dtype, torch.float32)
            self._first, self._first_entropy = values[0].clone(), entropy[0].clone()
            self._shift, self._square = torch.zeros_like(values[0]), torch.zeros_like(values[0])
            self._entropy_shift = torch.zeros_like(entropy[0])
        difference = values - self._first
        self._draws += draws.shape[0]
        self._shift += difference.sum(0)
        self._square += difference.square().sum(0)
        self._entropy_shift += (entropy - self._first_entropy).sum(0)
        if self._kept is not None:
            self._kept.append(draws.clone())  # the caller may use its buffer again

    def forecast(
        self,
        *,
        labels: Tensor | Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        choices: Tensor | None = None,
    ) -> ClassForecast:
        """The forecast from all draws added so far, with arguments as for `from_draws`."""
        if self._first is None:
            raise LikelihoodError("there are no draws to make a forecast from: call add() first")
        shift = self._shift / self._draws
        probabilities = self._first + shift
        total = _entropy(probabilities)
        aleatoric = self._first_entropy + self._entropy_shift / self._draws
        values = {
            "probabilities": probabilities,
            "total": total,
            "aleatoric": aleatoric,
            # Entropy is concave, so a negative difference can only be rounding.
            "epistemic": (total - aleatoric).clamp(min=0),
            "variance": (self._square / self._draws - shift.square()).clamp(min=0).sum(-1),
        }
        tensors: dict[str, Any] = {name: value.to(self._dtype) for name, value in values.items()}
        return ClassForecast(
            **tensors,
            draws=self._draws,
            samples=None if self._kept is None else torch.cat(self._kept),
            labels=as_labels(labels),
            texts=texts,
            label_names=label_names,
            choices=choices,
        )


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dim, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(-1)


def _checked(draws: Tensor, expected: tuple[int, ...] | None) -> Tensor:
    """The draws (s, N, C) on the CPU, if they are probabilities at all."""
    shape = tuple(draws.shape)
    if not draws.is_floating_point() or len(shape) != 3 or min(shape) < 1 or shape[2] < 2:
        raise LikelihoodError(
            "probabilities must be a floating (S, N, C) tensor with S, N >= 1 and C >= 2, "
            f"got {draws.dtype} of shape {shape}"
        )
    if expected is not None and shape[1:] != expected:
        raise LikelihoodError(
            f"probabilities are (N, C) = {shape[1:]}, those added before were {expected}"
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
