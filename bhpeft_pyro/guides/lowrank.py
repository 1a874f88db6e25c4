"""Low-rank guide: one Normal over all weights, narrow along the axes that data have told about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ..batch import Batch
from ..distributions import Covariance, LowRankNormal
from ..errors import GuideError
from ..model import Model
from ..priors import JointPrior
from .joint import JointGuide
from .latent import latents

__all__ = ["FullGuide", "LowRankGuide"]

_BUFFERS = ("scale", "axes", "ratio")


class LowRankGuide(JointGuide):
    """q(w) = N(loc, covariance) over all weights at once, with a low-rank precision.

    The covariance is the prior's until `fit` measures, from time to time, along which directions
    the predictions of the training texts depend on the weights; there it is narrowed (see
    `inference/curvature.py`). So weights of different layers and kinds may compensate each other,
    which independent ones (`NormalGuide`) cannot.

    Args:
        model: its prior must be Normal at every site, or an earlier posterior of this guide.
        rank: K, the number of directions. Takes K numbers a weight.
        names: the sites it covers; by default all.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> guide = LowRankGuide(tiny_model(), rank=3)
    >>> guide.covariance.rank, guide.means()["head.bias"]
    (0, tensor([0., 0.]))
    """

    def __init__(self, model: Model, rank: int = 64, names: Collection[str] | None = None) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise GuideError(f"LowRankGuide: rank must be an integer of at least 1, got {rank!r}")
        super().__init__(model, names)
        self.rank = rank
        start = self.prior.covariance
        for name in _BUFFERS:
            self.register_buffer(name, getattr(start, name))
        self.scale: Tensor
        self.axes: Tensor
        self.ratio: Tensor
        self._covariance = start

    @property
    def covariance(self) -> Covariance:
        """The covariance, over all weights in the order of the sites."""
        # Kept as one object, which remembers its divergence from a prior.
        if self._covariance.scale is not self.scale:  # loaded, copied or moved since
            self._covariance = Covariance(self.scale, self.axes, self.ratio)
        return self._covariance

    @covariance.setter
    def covariance(self, value: Covariance) -> None:
        self.scale, self.axes, self.ratio = value.scale, value.axes, value.ratio
        self._covariance = value

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        normal = LowRankNormal(self.loc, self.covariance, validate_args=False)
        infer: Any = {"is_auxiliary": not self._joint, "sites": self._shapes}
        return self._sites(self.unpack(pyro.sample(self.latent, normal, infer=infer)))

    def at(self, names: Collection[str]) -> Tensor:
        """(D,) whether a weight is of one of the sites `names`."""
        parts = self.unpack(self.loc.detach()).items()
        return torch.cat(
            [torch.full_like(part, n in names, dtype=torch.bool).flatten() for n, part in parts]
        )

    @torch.no_grad()
    def rescale(self, names: Collection[str], factor: float) -> None:
        """Multiply the weights of some sites, whose prior has mean zero."""
        factors = torch.where(self.at(names), factor, 1.0)
        old = self.covariance
        self.loc.mul_(factors)
        self.covariance = Covariance(factors * old.scale, old.axes, old.ratio)

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        old = self.covariance
        table = torch.cat([self.loc[None], old.scale[None], old.axes.mT])  # a column a weight
        parts = self.unpack(table)
        for name, (means, sds) in rows.items():
            axes = means.new_zeros(old.rank, *means.shape)
            more = torch.cat([means[None], sds[None], axes]).to(table)
            parts[name] = torch.cat([parts[name], more], 1)
        self._shapes = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        table = torch.cat([part.flatten(1) for part in parts.values()], 1)
        self.loc = nn.Parameter(table[0].clone())
        self.covariance = Covariance(table[1].clone(), table[2:].mT.contiguous(), old.ratio)

    @torch.no_grad()
    def marginal_kl(self) -> dict[str, float]:
        """By site, the KL to the prior of what the guide says of that site alone, in nats.

        Under a prior with independent sites these add up to the KL at most: correlations between
        sites, in which the effect of one makes up for that of another, are not in them.
        """
        prior = JointPrior(self.prior, self._shapes)
        pairs = (
            (own.marginal([name]).normal for own in (self.as_prior(), prior))
            for name in self._shapes
        )
        return {
            name: kl_divergence(*pair).item()
            for name, pair in zip(self._shapes, pairs, strict=True)
        }

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As every module's; the number of directions measured so far may differ."""
        for name in _BUFFERS:
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, value.to(self.loc).clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


class FullGuide(LowRankGuide):
    """q(w) = N(loc, covariance) with any covariance: a `LowRankGuide` of full rank.

    For a head or another block of up to some hundred weights: a covariance is measured on some
    thousand gradients.

    Args:
        model, names: as for `LowRankGuide`.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> FullGuide(tiny_model(())).rank
    34
    """

    def __init__(self, model: Model, names: Collection[str] | None = None) -> None:
        super().__init__(model, sum(x.loc.numel() for x in latents(model, names)), names)

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().grow(rows)
        self.rank = len(self.loc)

    def options(self) -> dict[str, Any]:
        return {}
