"""What guides with one Normal over all weights share: `lowrank` and its kin, and `laplace`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ..distributions import Covariance, LowRankNormal, base_of
from ..errors import GuideError
from ..model import Model
from ..priors import JOINT, JointPrior, joint_name, unpack
from .guide import Guide
from .latent import Latent, evidence, latents

__all__ = ["JointGuide"]


class JointGuide(Guide):
    """q(w) = N(loc, covariance) over all weights at once; a subclass says with what covariance.

    Args:
        model: its prior must be Normal at every site, or an earlier posterior of such a guide.
        names: the sites it covers; by default all.

    Attributes:
        loc: the mean, over all weights in the order of the sites.
        prior: over the same.
        latent: the name under which they are drawn.
    """

    def __init__(self, model: Model, names: Collection[str] | None = None) -> None:
        super().__init__()
        self._names = names
        self.follow(model)
        found = latents(model, names)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for latent in found:
            self._shapes |= latent.sites or {latent.name: tuple(latent.loc.shape)}
        self.loc = nn.Parameter(torch.cat([latent.loc.flatten() for latent in found]).clone())

    @property
    def covariance(self) -> Covariance:
        """The covariance, over all weights in the order of the sites."""
        raise NotImplementedError

    def follow(self, model: Model) -> None:
        found = latents(model)
        if others := [latent.name for latent in found if not (latent.is_site or latent.sites)]:
            raise GuideError(
                f"{type(self).__name__}: the prior also samples {', '.join(others)}, on which its "
                "sites may depend; expected independent Normals; for other priors take 'normal'"
            )
        if seen := evidence(model):
            raise GuideError(
                f"{type(self).__name__}: the prior has observations or factors, {', '.join(seen)}, "
                "which are not in its covariance; expected none; for such priors take 'normal'"
            )
        found = latents(model, self._names)
        self.prior = _normal(found, type(self).__name__)
        self._joint = bool(found[0].sites)
        if self._joint:
            self.latent = found[0].name
        else:
            self.latent = JOINT if self._names is None else joint_name(self._names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's, which moves or converts it; the prior comes along."""
        super()._apply(fn, recurse)
        loc = fn(self.prior.loc)
        if loc is not self.prior.loc:  # else it stays the object that the model's prior has, too
            covariance = self.prior.covariance.map(fn)
            self.prior = LowRankNormal(loc, covariance, validate_args=False)
        return self

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """`(*P, D)` to a tensor `(*P, *shape)` for each site."""
        return unpack(flat, self._shapes)

    def normal(self) -> LowRankNormal:
        """The posterior over all weights."""
        return LowRankNormal(self.loc.detach().clone(), self.covariance)

    def as_prior(self) -> JointPrior:
        return JointPrior(self.normal(), self._shapes, self.latent)

    def means(self) -> dict[str, Tensor]:
        return self.unpack(self.loc.detach().clone())

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        by_site = self.unpack(values.get(self.latent, self.loc)) | dict(values)
        self.loc.copy_(torch.cat([by_site[name].flatten() for name in self._shapes]))

    def scales(self) -> dict[str, Tensor]:
        return self.unpack(self.covariance.variance.sqrt())

    def _sites(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sites that a draw is made of; under a joint prior the model makes them itself."""
        if self._joint:
            return values
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=len(self._shapes[name])))
            for name, value in values.items()
        }


def _normal(found: Sequence[Latent], guide: str) -> LowRankNormal:
    """The prior of latents as one Normal, for a guide of this name.

    Raises:
        GuideError: a latent has another prior.
    """
    if not found:
        raise GuideError(f"{guide}: the model has no random weights; expected some")
    if len(found) == 1 and isinstance(normal := found[0].prior, LowRankNormal):
        return normal
    parts = []
    for latent in found:
        base = base_of(latent.prior)
        if not isinstance(base, Normal):
            raise GuideError(
                f"{guide}: the prior of {latent.name!r} is a {type(base).__name__}, expected a "
                "Normal; for other priors take 'normal' or one of Pyro's guides"
            )
        shape = latent.loc.shape
        parts.append([x.to(latent.loc).expand(shape).flatten() for x in (base.loc, base.scale)])
    locs, scales = zip(*parts, strict=True)
    return LowRankNormal(torch.cat(locs), Covariance.diagonal(torch.cat(scales)))
