"""Forecasts of ratings and other numbers: a mixture of Normals, or draws, for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.values import Inside, checked_call
from ..errors import LikelihoodError
from .base import Forecast, Labels, digits
from .metrics import aurc

_BISECTIONS = 80  # halves any bracket down to rounding in float64


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RatingForecast(Forecast):
    """A forecast of ratings: a mixture of S Normals for each example; made by `from_draws`.

    Under a likelihood that is not Normal, such as of counts, `outcomes` are drawn from it, and
    quantiles, intervals and the CRPS are those of these draws.

    `total`, `aleatoric` and `epistemic` are variances and add up by the law of total variance,
    Var(y) = E[Var(y | w)] + Var(E[y | w]) over weights w. Each of the S parts is a draw of the
    weights, or a component of the posterior under which the mean is itself Normal.

    Attributes:
        means: (S, N) the parts' means.
        sds: (S, N) the standard deviations of the ratings' noise, all positive.
        within: (S, N) variances of the parts' means, if these are Normal; None for draws.
        densities: (S, N) log density of the labels under each draw's own likelihood, if that is not
            Normal. `nlls` of these labels are then exact; those of others are of the Normals.
        outcomes: (S, N, R) labels drawn from each draw's own likelihood, if that is not Normal.
        scale: the ends of the scale, at which intervals end; None for an end that is open.
        components: how many components of the posterior the draws are of, equally many of each, in
            their order.

    >>> forecast = RatingForecast.from_draws(torch.tensor([[1.0], [3.0]]), torch.full((2, 1), 0.5))
    >>> forecast.mean, forecast.epistemic, forecast.aleatoric
    (tensor([2.]), tensor([1.]), tensor([0.2500]))
    >>> lower, upper = forecast.interval(0.9)
    >>> round(lower.item(), 2), round(upper.item(), 2)
    (0.36, 3.64)
    """

    quality: ClassVar[str] = "mean squared error"
    higher_is_better: ClassVar[bool] = False
    in_words: ClassVar[Mapping[str, str]] = {
        "aleatoric": "variance (squared units of the rating)",
        "epistemic": "variance",
        "total": "variance",
    }
    _by_draw: ClassVar[tuple[str, ...]] = ("means", "sds", "within", "densities", "outcomes")

    means: Tensor
    sds: Tensor
    within: Tensor | None = None
    densities: Tensor | None = None
    outcomes: Tensor | None = None
    scale: tuple[float | None, float | None] = (None, None)
    components: int = 1

    @classmethod
    def from_draws(cls, mean: Tensor, sd: Tensor, **known: Any) -> RatingForecast:
        """The mixture over S draws of Normal(mean, sd), both (S, N).

        `known` are the other attributes of the class and of `Forecast`.

        Raises:
            LikelihoodError: `mean` or `sd` has a wrong value.
            DataError: `labels` are not N numbers.
        """
        if not ((sd > 0) & (mean + sd).isfinite()).all():
            raise LikelihoodError(
                f"mean and sd must be finite and sd positive, got means from {mean.min():.3g} to "
                f"{mean.max():.3g} and sds from {sd.min():.3g} to {sd.max():.3g}"
            )
        dtype = torch.promote_types(torch.promote_types(mean.dtype, sd.dtype), torch.float32)
        values = known | {"means": mean, "sds": sd}
        for name in cls._by_draw:
            if (value := values.get(name)) is not None:
                values[name] = value.detach().to("cpu", dtype, copy=True)
        return cls(**values)

    def __len__(self) -> int:
        return self.means.shape[1]

    @property
    def draws(self) -> int:
        """S."""
        return self.means.shape[0]

    @property
    def mean(self) -> Tensor:
        """(N,) mean of the mixture, as far as it is within the scale."""
        return self._within_scale(self.free_mean)

    @property
    def free_mean(self) -> Tensor:
        """(N,) mean of the mixture, also beyond the ends of the scale, as training needs it."""
        return self._rounded(self.means.double().mean(0))

    @property
    def epistemic(self) -> Tensor:
        """(N,) variance of the mean, within the parts and between them."""
        between = self.means.double().var(0, correction=0)
        return self._rounded(between + self._within.mean(0))

    @property
    def between(self) -> Tensor | None:
        """(N,) the part of `epistemic` that is disagreement between components; None if there is
        only one."""
        count = self.components if self.within is None else self.draws
        if count == 1:
            return None
        of_each = self.means.double().unflatten(0, (count, -1)).mean(1)
        return self._rounded(of_each.var(0, correction=0))

    @property
    def aleatoric(self) -> Tensor:
        """(N,) mean over the draws of their variances."""
        return self._rounded(self.sds.double().square().mean(0))

    @property
    def total(self) -> Tensor:
        """(N,) variance of the mixture, epistemic + aleatoric."""
        return self.epistemic + self.aleatoric

    @property
    def sd(self) -> Tensor:
        """(N,) standard deviation of the mixture."""
        return self.total.sqrt()

    def with_labels(self, labels: Labels) -> RatingForecast:
        """This forecast with other observed labels, of which no `densities` are known."""
        return replace(super().with_labels(labels), densities=None)

    @checked_call
    def quantile(self, probability: Inside) -> Tensor:
        """(N,) quantile of the mixture, by bisection between its components' quantiles; of draws,
        the least that has this share of them at or below it."""
        if (drawn := self.sorted_outcomes) is not None:
            count = math.ceil(probability * drawn.shape[1] - 1e-9)
            return self._rounded(drawn[:, max(count, 1) - 1])
        means, sds = self.means.double(), self.component_sds
        ends = means + sds * torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
        lower, upper = ends.amin(0), ends.amax(0)
        for _ in range(_BISECTIONS):
            middle = (lower + upper) / 2
            below = torch.special.ndtr((middle - means) / sds).mean(0) < probability
            lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
        return self._rounded(upper)

    @cached_property
    def sorted_outcomes(self) -> Tensor | None:
        """(N, S R) float64, all of `outcomes` in ascending order."""
        if self.outcomes is None:
            return None
        return self.outcomes.double().transpose(0, 1).flatten(1).sort(-1).values

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends (N,), (N,) of the mixture's central interval of probability `level`, as far as it is
        within the scale."""
        ends = self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)
        return self._within_scale(ends[0]), self._within_scale(ends[1])

    def _within_scale(self, ratings: Tensor) -> Tensor:
        low, high = self.scale
        return ratings if low is None and high is None else ratings.clamp(low, high)

    def _doubted(self) -> Tensor:
        # Noise alone, the same for most texts, is no reason to doubt one of them.
        return self.epistemic > self.aleatoric

    def loss(self, labels: Tensor) -> Tensor:
        return (self.mean.double() - labels.double()).square()

    def chance_right(self, tolerance: float | None = None) -> Tensor:
        mean, tolerance = self.mean.double(), tolerance or 0.0
        if (drawn := self.sorted_outcomes) is not None:
            away = self._within_scale(drawn) - mean.unsqueeze(-1)
            return (away.abs() <= tolerance).double().mean(-1)
        away, sds = mean - self.means.double(), self.component_sds
        above, below = (
            torch.special.ndtr((away + end) / sds).mean(0) for end in (tolerance, -tolerance)
        )
        low, high = self.scale  # no rating is beyond them
        if high is not None:
            above = above.masked_fill(mean + tolerance >= high, 1.0)
        return above - (below if low is None else below.masked_fill(mean - tolerance <= low, 0.0))

    def nlls(self, labels: Labels | None = None) -> Tensor:
        if labels is None and self.densities is not None:
            components = self.densities.double()
        else:
            observed, sds = self.observed(labels).double(), self.component_sds
            z = (observed - self.means.double()) / sds
            components = -0.5 * z.square() - sds.log() - 0.5 * math.log(2 * math.pi)
        return math.log(self.draws) - components.logsumexp(0)

    def scores(self) -> dict[str, float]:
        from sklearn.metrics import mean_absolute_error, mean_squared_error  # slow to import

        truth, mean = self.observed().double().numpy(), self.mean.double().numpy()
        return {
            "mse": mean_squared_error(truth, mean),
            "mae": mean_absolute_error(truth, mean),
            "nll": self.nlls().mean().item(),
            "crps": self.crps().mean().item(),
            "coverage_90": self.coverage()[0],
            "aurc": aurc(self.loss(self.observed()), self.total),
        }

    def simplest(self, known: Tensor) -> tuple[str, Tensor]:
        away = self.observed().double() - known.double().mean()
        return "always the mean rating", away.square()

    def crps(self, labels: Labels | None = None) -> Tensor:
        """(N,) continuous ranked probability score of the mixture of Normals (Grimit et al. 2006).

        In closed form: E|Y - y| - E|Y - Y'| / 2 with Y, Y' independent draws of the mixture; of
        `outcomes`, if there are any, the same over them. It has the unit of the ratings; smaller is
        better.
        """
        truth = self.observed(labels).double()
        if (drawn := self.sorted_outcomes) is not None:
            count = drawn.shape[1]
            places = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
            away = (drawn - truth.unsqueeze(-1)).abs().mean(-1)
            return away - (drawn @ places) / count**2
        means, sds = self.means.double(), self.component_sds
        score = _mean_absolute(means - truth, sds).mean(0)
        spread = torch.zeros_like(score)
        for mean, sd in zip(means, sds, strict=True):  # S passes over (S, N), never (S, S, N)
            spread += _mean_absolute(means - mean, torch.hypot(sds, sd)).mean(0)
        return score - spread / (2 * self.draws)

    def coverage(self, labels: Labels | None = None, *, level: float = 0.9) -> tuple[float, float]:
        """The share of labels within the central interval of probability `level`, and its mean
        width.

        Both matter: a wide enough interval covers anything.

        >>> forecast = RatingForecast.from_draws(torch.zeros(1, 2), torch.ones(1, 2))
        >>> inside, width = forecast.coverage([0.0, 5.0])
        >>> inside, round(width, 2)
        (0.5, 3.29)
        """
        truth = self._rounded(self.observed(labels))  # as the ends are
        lower, upper = self.interval(level)
        inside = (lower <= truth) & (truth <= upper)
        return inside.double().mean().item(), (upper - lower).double().mean().item()

    def named(self, labels: Tensor) -> list[Any]:
        return digits(labels) if labels.dtype == torch.float32 else labels.tolist()

    def _predicted(self) -> dict[str, list[Any]]:
        lower, upper = self.interval(0.9)
        columns = {"prediction": self.mean, "sd": self.sd, "lower_90": lower, "upper_90": upper}
        return {name: digits(values) for name, values in columns.items()}

    def _headline(self) -> tuple[str, str]:
        parts = "draws" if self.within is None else "components"
        usual = f"mean rating {self.mean.mean():.3f}, mean sd {self.sd.mean():.3f}"
        return f"{len(self)} examples, {self.draws} {parts}", usual

    @property
    def _within(self) -> Tensor:
        """(S, N), or (1, 1) where the parts' means are known."""
        return torch.zeros(1, 1).double() if self.within is None else self.within.double()

    @property
    def component_sds(self) -> Tensor:
        """(S, N) float64 sds of the mixture's Normals, of noise and mean together."""
        return (self.sds.double().square() + self._within).sqrt()

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.sds.dtype)


def _mean_absolute(mean: Tensor, sd: Tensor) -> Tensor:
    """E|X| for X ~ Normal(mean, sd)."""
    ratio = mean / sd
    density = (-0.5 * ratio.square()).exp() / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * torch.erf(ratio / math.sqrt(2))
