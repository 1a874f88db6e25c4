"""Ratings: real numbers with Normal noise, or with a few that are far off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Self

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ...base.values import Finite, Positive, checked_dataclass
from ...errors import ConfigError, DataError, LikelihoodError
from ...peft.sites import Site, zeros
from .likelihood import Likelihood, Outputs, Range

_SITE = "noise.log_scale"
LEAST_NOISE = 1e-3
"""The least noise scale that is set rather than trained, in units; ratings may all be the same."""
_FAR = 8.0  # from the centre, in spreads
_COARSE = 0.01  # of the spread: rounding then adds 1e-5 to the variance
_MOST = 20.0  # of a log scale: under a wide posterior it would overflow or become 0


@checked_dataclass
class Ratings(Likelihood):
    """Ratings whose mean is `center` + `spread` times the first output, and whose noise has a
    learnt scale, spread * exp(s) with s the site "noise.log_scale" ()."""

    center: Finite | None = None
    spread: Positive | None = None
    low: Finite | None = field(default=None, repr=False, kw_only=True)
    high: Finite | None = field(default=None, repr=False, kw_only=True)
    kind = "rating"

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError(f"low={self.low}, high={self.high}: expected low below high")

    @property
    def unit(self) -> float:  # type: ignore[override]
        return 1.0 if self.spread is None else self.spread

    def standardised(self, labels: Tensor | None) -> Self:
        given = torch.tensor([-1.0, 1.0]) if labels is None else labels.double()
        sd = given.std(correction=0).item()
        center = given.mean().item() if self.center is None else self.center
        spread = (sd if self.spread is None else self.spread) or 1.0  # all may be the same
        largest = given.abs().max().item()
        step = torch.finfo(torch.float32).eps * largest  # labels and predictions are rounded to it
        if labels is not None and step > _COARSE * min(spread, sd or 1.0):
            raise DataError(
                f"data: ratings as large as {largest:.7g} are rounded to steps of {step:.2g} "
                f"(single precision), too coarse for ratings that differ so little (sd {sd:.2g} "
                f"after rounding); subtract an offset from all, such as {largest:.7g}"
            )
        if self.center is not None and self.spread is not None:
            return self
        return replace(self, center=center, spread=spread)

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """The noise of a constant prediction: the labels' sd."""
        sd = labels.float().std(correction=len(labels) > 1).clamp_min(LEAST_NOISE * self.unit)
        return {_SITE: (sd / self.unit).log()}

    @property
    def sites(self) -> tuple[Site, ...]:
        unit = torch.tensor(1.0, dtype=torch.float32)
        return (Site(_SITE, (), (), unit, zeros((), unit)),)

    @property
    def label_range(self) -> Range:  # type: ignore[override]
        return self.low, self.high

    def exported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With a head whose output is the mean rating itself."""
        if self.outputs != 1:  # there is one for the noise
            return super().exported(weights)
        weight, center = weights["head.weight"].clone(), self.center or 0.0
        weight[..., 0, :] *= self.unit
        if (bias := weights.get("head.bias")) is None:
            if center:
                raise LikelihoodError(
                    f"likelihood: {self} adds {center:g} to each output, and this classifier's "
                    "last layer has no bias; expected center=0"
                )
            return {**weights, "head.weight": weight}
        bias = bias.clone()
        bias[..., 0] = center + self.unit * bias[..., 0]
        return {**weights, "head.weight": weight, "head.bias": bias}

    def off_scale(self, labels: Tensor) -> str | None:
        for end, sign in ((self.low, -1.0), (self.high, 1.0)):
            if end is not None and (beyond := sign * (labels - end)).max() > 0:
                rating = labels[beyond.argmax()].item()
                return f"a rating of {rating:g} is beyond {end:g}, where forecasts end"
        away = (labels - (self.center or 0.0)).abs() / self.unit
        if (most := away.max().item()) <= _FAR:
            return None
        rating = labels[away.argmax()].item()
        return f"a rating of {rating:g} is {most:.0f} spreads from the centre of {self}"

    def _middle(self, outputs: Outputs) -> Tensor:
        return (self.center or 0.0) + self.unit * outputs.values[..., 0]

    def _scale(self, outputs: Outputs) -> Tensor:
        return self.unit * outputs.weights[_SITE].clamp(-_MOST, _MOST).exp()


@checked_dataclass
class Normal(Ratings):
    """Ratings with one learnt noise scale for all texts.

    mean = center + spread * output, sd = spread * exp(s) with s the site "noise.log_scale" ().

    Args:
        center, spread: the middle of the ratings and a typical distance from it, in the ratings'
            own unit, so that outputs and their priors are of order one. None is the mean and the
            sd of the ratings that `fit` is given in the first round; without a fit, 0 and 1.
        low, high: the ends of the scale, if no rating can be beyond them: means and intervals of
            forecasts end there, and nothing else changes.

    Raises:
        ConfigError: `center`, `low` or `high` is not a finite number, `spread` not a positive
            one, or `low` not below `high`.

    >>> fit = Normal(center=3., spread=2.).distribution(
    ...     Outputs(torch.zeros(1, 1), {"noise.log_scale": torch.tensor(0.)}))
    >>> fit.mean.item(), fit.stddev.item()
    (3.0, 2.0)
    """

    outputs = 1
    linear_mean = True
    noise_site = _SITE

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        return dist.Normal(self._middle(outputs), self._scale(outputs))


@checked_dataclass
class HeteroscedasticNormal(Ratings):
    """Ratings with a noise scale for each text: a learnt scale for all, times a second output's
    factor.

    mean = center + spread * output_0, sd = spread * exp(s) * factor with s the site
    "noise.log_scale" (). The factor is 1 at output_1 = 0 and grows with it.

    Args:
        center, spread, low, high: as for `Normal`.

    Raises:
        ConfigError: as for `Normal`.

    >>> HeteroscedasticNormal(low=1., high=5.).outputs
    2
    """

    outputs = 2
    linear_mean = True
    noise_site = _SITE

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        # softplus, shifted to give 1 at 0: no overflow, and never exactly 0
        factor = functional.softplus(outputs.values[..., 1] + 0.5413248546) + 1e-4
        return dist.Normal(self._middle(outputs), self._scale(outputs) * factor)


@checked_dataclass
class StudentT(Ratings):
    """Ratings of which a few are far off: Student's t, with one learnt scale for all texts.

    center + spread * output is the middle, and the scale is spread * exp(s) with s the site
    "noise.log_scale" ().

    Args:
        center, spread, low, high: as for `Normal`.
        df: the degrees of freedom, above 2 so that there is an sd; 4 has far heavier tails than a
            Normal, 30 hardly any.

    Raises:
        ConfigError: as for `Normal`; or `df` is not above 2.

    >>> StudentT(df=5.)
    StudentT(center=None, spread=None, df=5.0)
    """

    df: Annotated[Finite, Field(gt=2)] = 4.0
    outputs = 1

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        return dist.StudentT(self.df, self._middle(outputs), self._scale(outputs))
