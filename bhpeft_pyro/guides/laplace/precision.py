"""A Normal's precision as tau P + I: P is the first prior's, I the information of data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...base.distributions import Covariance


@dataclass(frozen=True, eq=False)
class Precision:
    """The precision tau P + I, where P = diag(`first`^-2) is that of the first round's prior and I
    is what data have contributed since, N_1 F_1 + N_2 F_2 + ... (`LaplaceGuide`).

    Attributes:
        covariance: the inverse of tau P + I.
        first: (D,) sds of the first round's prior.
        tau: the multiple of P.

    >>> import torch
    >>> covariance = Covariance.from_precision(torch.tensor([4.0, 5.0]), torch.zeros(2, 0))
    >>> precision = Precision(covariance, first=torch.tensor([0.5, 0.5]))
    >>> precision.informed, 1 / precision.at(0.5).variance
    (True, tensor([2.0000, 3.0000]))
    """

    covariance: Covariance
    first: Tensor
    tau: float = 1.0

    @property
    def informed(self) -> bool:
        """For tau = 1, whether I is not zero."""
        # Setting the first prior's scales leaves rounding errors in the scales.
        less = self.covariance.scale < 0.999 * self.first
        return bool(self.covariance.rank) or bool(less.any())

    def at(self, tau: float, times: Tensor | None = None) -> Covariance:
        """The inverse of tau P + I at another tau; with `times`, (D,), of tau P + C I C, where C is
        the diagonal matrix of their roots."""
        if tau == self.tau and times is None:
            return self.covariance
        return self._inverse(tau * self.first.pow(-2), times)

    def under(self, first: Tensor) -> Covariance:
        """The inverse of tau P + I with other sds of the first prior, (D,)."""
        return self._inverse(self.tau * first.pow(-2))

    def _inverse(self, prior: Tensor, times: Tensor | None = None) -> Covariance:
        own = self.covariance.scale.pow(-2) - self.tau * self.first.pow(-2)
        learnt, root = own.clamp_min(0), self.covariance.precision_root()
        if times is not None:
            learnt, root = times * learnt, times.sqrt().unsqueeze(-1) * root
        return Covariance.from_precision(prior + learnt, root)
