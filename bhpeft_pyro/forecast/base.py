"""The contract of forecasts, and what all kinds of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..base.values import SomeShare, checked_call
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..decisions.promises import Promise

Labels = Tensor | Sequence[float] | Sequence[str]
"""Observed labels: numbers, or names of classes."""
_METHODS = {"exact": "exact forecasts", "point": "forecasts by the mean weights"}
_REASONS = ("people may differ", "models disagree", "little learnt from such texts")
_PARTS = ("epistemic", "aleatoric", "total")
_UNLIKE = "unlike what was learnt"
_SURE = 0.9  # a probability of being right from which nothing is to doubt


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Forecast(ABC):
    """A predictive distribution for each of N examples.

    Attributes:
        labels: (N,) the observed labels, (N, K) if each text may have K of them, or None.
        texts: the N texts, or None.
        method: how it was made, as `Posterior.predict` takes it; "draws" of the weights; "point".
        passes: mean number of passes of the network for each text, forward and backward, including
            that of the frozen backbone for `novelty`; None if unknown.
        novelty: (N,) float64 p-values, small for texts unlike the learnt ones; None if unknown
            (`decisions.novelty`).
        nearest: for each text the learnt one that is most like it, if the posterior has kept texts
            (`FitOptions.keep_texts`); or None.
        promised: what is promised of the answers, if `Posterior.promise` has promised anything of
            forecasts that are made in this way.
        quality: in words, what `metrics.rejection_curve` measures.
        higher_is_better: whether that is one minus the mean `loss`, and not the mean loss itself.
        measures: the names that `uncertainty` takes.
        in_words: what the two parts of the uncertainty are, and in which unit.
    """

    quality: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = _PARTS
    in_words: ClassVar[Mapping[str, str]] = {
        "aleatoric": "expected entropy (nats)",
        "epistemic": "mutual information (nats)",
        "total": "uncertainty (nats)",
    }
    _by_draw: ClassVar[tuple[str, ...]] = ()  # tensors whose second dimension counts examples
    _of_all: ClassVar[tuple[str, ...]] = ()  # tensors without such a dimension

    labels: Tensor | None = None
    texts: Sequence[str] | None = None
    method: str = ""
    passes: float | None = None
    promised: Promise | None = None
    novelty: Tensor | None = None
    nearest: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        labels = as_tensor(self.labels)
        if labels.shape != self._labels_shape:  # torch would repeat them
            raise DataError(
                f"labels have shape {tuple(labels.shape)}; expected {self._labels_shape}"
            )
        object.__setattr__(self, "labels", labels)

    @property
    def _labels_shape(self) -> tuple[int, ...]:
        return (len(self),)

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of examples."""

    @abstractmethod
    def loss(self, labels: Tensor) -> Tensor:
        """(N,) 0-1 loss of the predicted class, share of wrong labels, or squared error of the
        mean, in double precision."""

    @abstractmethod
    def nlls(self, labels: Labels | None = None) -> Tensor:
        """(N,) NLL of each example in double precision; by default of the forecast's own labels."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """All metrics of the forecast against its own labels (`metrics.evaluate`)."""

    @abstractmethod
    def chance_right(self, tolerance: float | None = None) -> Tensor:
        """(N,) float64 the probability that the answer is right, as `wrong` judges it."""

    @abstractmethod
    def simplest(self, known: Tensor) -> tuple[str, Tensor]:
        """A baseline that ignores the texts and uses only the labels `known`: its name, and its
        (N,) `loss`."""

    @abstractmethod
    def named(self, labels: Tensor) -> list[Any]:
        """Labels as a table has them: classes by name."""

    @abstractmethod
    def _predicted(self) -> dict[str, list[Any]]:
        """Columns of `table`: the prediction, and how probable or wide it is."""

    @abstractmethod
    def _headline(self) -> tuple[str, str]:
        """How large the forecast is, and what it says on average."""

    def wrong(self, tolerance: float | None = None) -> Tensor:
        """(N,) bool, whether the answer is wrong: not the observed class, any label too many or too
        few, or a mean further than `tolerance` from the rating."""
        return self.loss(self.observed()) > (tolerance or 0.0) ** 2

    @property
    def answered(self) -> Tensor | None:
        """(N,) bool, which texts are answered under the promise; the others are for people. None if
        nothing is promised of this forecast."""
        return None if self.promised is None else self.promised.answers(self)

    def sets(self, level: float = 0.9, *, empty: bool = False) -> list[list[Any]]:
        """N lists of classes or choices that have the observed one in them for a share of at least
        `level` of the texts; see `decisions.sets`."""
        from ..decisions.sets import sets_of

        return sets_of(self, level, empty)

    def intervals(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends (N,), (N,) of intervals that have the rating in them for a share of at least `level`
        of the texts; see `decisions.sets`."""
        from ..decisions.sets import intervals_of

        return intervals_of(self, level)

    def table(
        self, flag: float | None = None, by: str = "total", coverage: float | None = None
    ) -> pd.DataFrame:
        """A row for each example, with the columns that `bhpeft predict` writes.

        These are `text` and `label`, where they are known, and `prediction`; of classes its
        `probability`, of several labels that of each by its name; of ratings `sd`, `lower_90` and
        `upper_90`, the ends of the 90 % interval; `epistemic` and `aleatoric`; `novelty` and
        `nearest`, where they are known; `reason` (`reasons`) and `answered`, None where there is
        none. Cells are plain values of Python, numbers with as many digits as float32 has.

        Args:
            flag: adds the column `flagged`, True for this share of the examples, the least certain.
            by: what is least certain, as for `flag`.
            coverage: adds sets, such as `set_90`, or the ends of intervals, `from_90` and `to_90`,
                that contain the label for this share of the texts (`sets`, `intervals`).
        """
        columns: dict[str, Any] = {"text": self.texts}
        columns["label"] = None if self.labels is None else self.named(self.labels)
        columns |= self._predicted()
        columns |= {part: digits(self.uncertainty(part)) for part in _PARTS[:2]}
        columns["novelty"] = None if self.novelty is None else digits(self.novelty)
        columns |= {"reason": self.reasons(), "nearest": self.nearest}
        # There with and without a promise, so that a new round changes no columns.
        answered = self.answered
        columns["answered"] = [None] * len(self) if answered is None else answered.tolist()
        if coverage is not None:
            from ..decisions.sets import covering

            columns |= covering(self, coverage)
        if flag is not None:
            flagged = torch.zeros(len(self), dtype=torch.bool)
            flagged[self.flag(flag, by)] = True
            columns["flagged"] = flagged.tolist()
        known = {name: values for name, values in columns.items() if values is not None}
        return pd.DataFrame({name: _series(values) for name, values in known.items()})

    def uncertainty(self, by: str = "total") -> Tensor:
        """(N,) one of `measures`, or 1 - confidence, or 1 - novelty: larger is less certain."""
        known = self.measures if self.novelty is None else (*self.measures, "novelty")
        if by not in known:
            raise ConfigError(f"by={by!r} must be one of {', '.join(map(repr, known))}")
        values: Tensor = getattr(self, by)
        return 1 - values if by in ("confidence", "novelty") else values

    @checked_call
    def flag(self, fraction: SomeShare = 0.1, by: str = "total") -> Tensor:
        """Indices of the `fraction` least certain examples, the least certain first.

        At least one example is flagged; equally certain ones stay in order. By "total" these are
        the examples most likely to be wrong; by "epistemic", those whose labels would teach most.
        """
        order = self.uncertainty(by).argsort(descending=True, stable=True)
        # 0.07 * 100 is a little above 7.
        return order[: max(math.ceil(fraction * len(self) - 1e-9), 1)]

    @checked_call
    def unlike(self, max_false_alarms: SomeShare = 0.05) -> Tensor:
        """(N,) bool, which texts are unlike what was learnt; of the texts that resemble the learnt
        ones, at most a share of `max_false_alarms` is flagged on average.

        Raises:
            ConfigError: the share is not above 0 and at most 1.
            DataError: the posterior does not know what it has learnt.
        """
        if self.novelty is None:
            from ..decisions.novelty import NONE_KNOWN

            raise DataError(f"novelty: {NONE_KNOWN}")
        return self.novelty <= max_false_alarms

    def reasons(self) -> list[str | None]:
        """For each example the main reason to doubt its forecast; None if there is none.

        A text with a p-value of at most 5 % is "unlike what was learnt": far from that a forecast
        may look sure, and need not be wrong. Other forecasts are doubted if the promise leaves them
        to people; without a promise, if they are right with a probability below 0.9, or, for
        ratings, if most of the variance is epistemic. The reason is then the largest part of the
        uncertainty: "people may differ" is aleatoric, "models disagree" is what is epistemic
        between the components of a mixture, and "little learnt from such texts" is the rest of
        that, within them.
        """
        noise, epistemic = self.uncertainty("aleatoric"), self.uncertainty("epistemic")
        between = getattr(self, "between", None)
        between = torch.zeros_like(epistemic) if between is None else between
        main = torch.stack([noise, between, epistemic - between]).argmax(0)
        answered = self.answered
        doubted = self._doubted() if answered is None else ~answered
        unlike = torch.zeros_like(doubted) if self.novelty is None else self.unlike()
        return [
            _UNLIKE if novel else _REASONS[why] if doubt else None
            for novel, doubt, why in zip(*map(Tensor.tolist, (unlike, doubted, main)), strict=True)
        ]

    def _doubted(self) -> Tensor:
        """(N,) bool, which forecasts are to doubt if nothing is promised of them."""
        return self.chance_right() < _SURE

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One forecast of all parts of the same data, which were predicted in the same way."""
        if len(parts) == 1:
            return parts[0]
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(parts[0])):
            of_parts = [getattr(part, name) for part in parts]
            if isinstance(of_parts[0], Forecast):
                values[name] = of_parts[0].joined(of_parts)
            elif isinstance(of_parts[0], Tensor) and name not in cls._of_all:
                values[name] = join(of_parts, int(name in cls._by_draw))
            elif name in ("texts", "nearest") and of_parts[0] is not None:
                values[name] = tuple(chain.from_iterable(of_parts))
        return replace(parts[0], **values)

    def with_labels(self, labels: Labels) -> Self:
        """This forecast with other observed labels."""
        return replace(self, labels=as_tensor(labels))

    def observed(self, labels: Labels | None = None) -> Tensor:
        """The given labels, or else the forecast's own."""
        known = self.labels if labels is None else self.with_labels(labels).labels
        if known is None:
            raise DataError("labels are needed: the forecast has none, and none were given")
        return known

    def __repr__(self) -> str:
        size, usual = self._headline()
        if self.method:
            usual += f"; {way_in_words(self.method, self.passes)}"
        epistemic, aleatoric, total = (f"{self.uncertainty(by).mean():.4f}" for by in _PARTS)
        parts = f"{aleatoric} aleatoric + {epistemic} epistemic"
        lines = [f"{type(self).__name__}: {size}", usual]
        lines.append(f"mean {self.in_words['total']} {total} = {parts}")
        if self.novelty is not None:
            count = int(self.unlike().sum())
            lines.append(f"{count} unlike what was learnt (at most 5 % false alarms)")
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        from ..plots.html import forecast_html  # matplotlib is slow to import

        return forecast_html(self)


def way_in_words(method: str, passes: float | None = None) -> str:
    """How texts are predicted, and what it costs, on average.

    >>> way_in_words("exact", 3.8), way_in_words("student")
    ('exact forecasts, 3.8 passes a text', 'forecasts by the student')
    """
    way = _METHODS.get(method, f"forecasts by the {method}")
    return way if passes is None else f"{way}, {passes:.3g} pass{'es' * (passes != 1)} a text"


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Join tensors; where their last dimension is another one, it is the choices, and is padded."""
    if parts[0].dim() > dim + 1:
        width = max(part.shape[-1] for part in parts)
        parts = [pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.cat([*parts], dim)


def digits(values: Tensor) -> list[float]:
    """Numbers with the digits that float32 has."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def as_tensor(values: Any) -> Tensor:
    """Numbers of any library as a tensor on the CPU; Python's are in double precision."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    return torch.from_numpy(np.array([*values]))


def _series(values: Sequence[Any]) -> pd.Series[Any]:
    """A column of numbers or truth values, or of what Python has them as: None stays None."""
    plain = {bool: bool, float: float, int: int}
    return pd.Series([*values], dtype=plain.get(type(values[0]), object) if values else object)
