"""Low-rank guide: one Normal over all weights, narrow along the axes that data have told about.

What guides with one Normal over all weights share: `lowrank` and its kin, and `laplace`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ..data.batch import Batch
from ..distributions import Covariance, LowRankNormal, base_of
from ..errors import GuideError
from ..model.model import Model
from ..priors import JOINT, JointPrior, joint_name, unpack
from .guide import Guide
from .latent import Latent, evidence, latents

__all__ = [
    "FullGuide",
    "JointGuide",
    "LowRankGuide",
]


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
