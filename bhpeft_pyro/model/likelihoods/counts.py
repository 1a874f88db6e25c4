"""Counts: whole numbers from 0 on, with a rate that grows with an exposure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ...checks import Number, check_fields, string
from ...data.columns import wrong
from ...errors import LikelihoodError
from ...peft.sites import Site, zeros
from .likelihood import NO_EXTRA, Extra, Likelihood

_MOST = 20.0  # e^20 times the usual rate: beyond it, a wide posterior's rates would overflow


# Log probabilities of large counts are small differences of large numbers. Samplers expect the
# type of the weights.
class _DoublePoisson(dist.Poisson):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.double()).float()


class _DoubleNegativeBinomial(dist.NegativeBinomial):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.double()).float()


@dataclass(frozen=True)
class _Counts(Likelihood):
    """Counts whose mean is exposure * exp(center + output)."""

    center: float | None = None
    exposure: str | None = None
    kind = "rating"
    outputs = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_fields(self, {"center": Number(none=True)}, name, LikelihoodError)
        if self.exposure is not None:
            string(f"{name}: exposure", self.exposure, LikelihoodError)

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.exposure is None else (self.exposure,)

    def standardised(self, labels: Tensor | None, extra: Extra = NO_EXTRA) -> Self:
        if self.center is not None:
            return self
        if labels is None:
            return replace(self, center=0.0)
        exposure = torch.ones_like(labels) if self.exposure is None else extra[self.exposure]
        rate = labels.double().sum() / exposure.double().sum()
        return replace(self, center=rate.log().item() if rate > 0 else 0.0)

    def check_extra(self, extra: Extra, rows: Tensor) -> None:
        for column in self.columns:
            if len(bad := (extra[column] <= 0).nonzero().flatten()):
                got = f"{extra[column][bad[0]]:g}; expected an exposure above 0"
                raise wrong(column, rows[bad].unique().tolist(), got)

    def distribution(
        self,
        outputs: Tensor,
        weights: Mapping[str, Tensor],
        choices: Tensor | None = None,
        extra: Extra = NO_EXTRA,
    ) -> TorchDistribution:
        log_rate = (self.center or 0.0) + outputs[..., 0].double().clamp(-_MOST, _MOST)
        mean = log_rate.exp()
        if self.exposure is None:
            return self._around(mean, weights)
        exposure = extra[self.exposure]
        if not (exposure > 0).all():
            raise LikelihoodError(
                f"{type(self).__name__}: the exposure {self.exposure!r} must be above 0, got "
                f"{exposure.min():g}"
            )
        return self._around(mean * exposure, weights)

    @abstractmethod
    def _around(self, mean: Tensor, weights: Mapping[str, Tensor]) -> TorchDistribution:
        """The counts with this mean."""


@dataclass(frozen=True)
class Poisson(_Counts):
    """Counts whose variance is their mean, exposure * exp(center + output).

    Args:
        center: the logarithm of a usual count (for an exposure of 1). None is that of the mean of
            the counts that `fit` is given in the first round; without a fit, 0.
        exposure: the column of the data with each text's exposure, such as the hours over which
            something was counted; by default 1 for all.

    Raises:
        LikelihoodError: `center` is not a finite number, or `exposure` not a str.

    >>> Poisson(exposure="hours").distribution(
    ...     torch.zeros(2, 1), {}, extra={"hours": torch.tensor([1.0, 3.0])}).mean.tolist()
    [1.0, 3.0]
    """

    def _around(self, mean: Tensor, weights: Mapping[str, Tensor]) -> TorchDistribution:
        return _DoublePoisson(mean)


@dataclass(frozen=True)
class NegativeBinomial(_Counts):
    """Counts that vary more than a Poisson's: of mean m = exposure * exp(center + output), and
    variance m + m^2 exp(s), with s the site "dispersion.log" ().

    Args:
        center, exposure: as for `Poisson`.

    Raises:
        LikelihoodError: as for `Poisson`.

    >>> counts = NegativeBinomial().distribution(
    ...     torch.zeros(1, 1), {"dispersion.log": torch.tensor(0.0)})
    >>> counts.mean.item(), counts.variance.item()
    (1.0, 2.0)
    """

    @property
    def sites(self) -> tuple[Site, ...]:
        unit = torch.tensor(1.0, dtype=torch.float32)
        return (Site("dispersion.log", (), (), unit, zeros((), unit)),)

    def _around(self, mean: Tensor, weights: Mapping[str, Tensor]) -> TorchDistribution:
        dispersion = weights["dispersion.log"].double().clamp(-_MOST, _MOST)
        return _DoubleNegativeBinomial((-dispersion).exp(), logits=mean.log() + dispersion)
