"""A guide held at the mean of its joint Normals: the first steps of a fit are taken without noise.

Before a covariance has been measured, draws are the prior's: noise from which a mean learns slowly.
"""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger

from ..distributions import LowRankNormal

__all__ = ["AtMean"]


class AtMean(Messenger):
    """Every `LowRankNormal` that is sampled gives its mean; densities and KLs stay its own.

    >>> import pyro, torch
    >>> from bhpeft_pyro.distributions import Covariance
    >>> normal = LowRankNormal(torch.ones(2), Covariance.diagonal(torch.ones(2)))
    >>> AtMean()(lambda: pyro.sample("w", normal))()
    tensor([1., 1.])
    """

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], LowRankNormal):
            msg["value"] = msg["fn"].mean
