"""What Pyro's autoguides say of their posteriors, as priors of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import autoguide as pyro_guides
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..distributions import Constrained, Covariance, LowRankNormal
from ..errors import GuideError
from ..priors import FlowPrior, JointPrior, VectorPrior, unpack
from .latent import Latent, is_real

__all__ = ["independent", "joint"]

_LARGEST = 4096  # latents of a covariance that is made whole: 64 MiB


def independent(auto: AutoGuide, latents: Sequence[Latent]) -> dict[str, TorchDistribution] | None:
    """A distribution for each latent, detached and copied, if they are independent Normals."""
    shapes = {x.name: tuple(x.loc.shape) for x in latents}
    if isinstance(auto, pyro_guides.AutoNormal):
        pairs = [auto._get_loc_and_scale(name) for name in shapes]
    elif isinstance(auto, pyro_guides.AutoDiagonalNormal):
        locs, scales = (unpack(value, shapes) for value in (auto.loc, torch.as_tensor(auto.scale)))
        pairs = [(locs[name], scales[name]) for name in shapes]
    else:
        return None
    found: dict[str, TorchDistribution] = {}
    for latent, (loc, scale) in zip(latents, pairs, strict=True):
        normal = dist.Normal(loc.detach().clone(), scale.detach().clone()).to_event(loc.dim())
        found[latent.name] = (
            normal if is_real(latent.support) else Constrained(normal, latent.support)
        )
    return found


def joint(auto: AutoGuide, latents: Sequence[Latent], options: Mapping[str, Any]) -> VectorPrior:
    """The posterior over all sites at once.

    Args:
        auto: a guide of all sites.
        latents: that it covers, in their order.
        options: that a flow was made with.

    Raises:
        GuideError: a point, a family that does not know its density, latents that are no sites or
            not real, or more of them than a covariance matrix can have.
    """
    name = type(auto).__name__
    shapes = {latent.name: tuple(latent.loc.shape) for latent in latents}
    if isinstance(auto, pyro_guides.AutoDelta | pyro_guides.AutoLaplaceApproximation):
        raise GuideError(
            f"{name} is a point, which has no width, so it cannot be a prior: fit 'laplace', or a "
            "'delta' guide with a width=..."
        )
    if others := [x.name for x in latents if not (x.is_site and is_real(x.support))]:
        raise GuideError(
            f"{name} also holds {', '.join(others)}, so its posterior cannot be a prior; expected "
            "sites of real weights alone, or 'normal' or AutoNormal"
        )
    if isinstance(auto, pyro_guides.AutoNormalizingFlow) and "init_transform_fn" not in options:
        flow: Any = auto.get_transform()
        return FlowPrior(options, flow.state_dict(), shapes)
    size = sum(latent.loc.numel() for latent in latents)
    if size > _LARGEST:
        raise GuideError(
            f"{name} of {size:,} latents cannot be a prior: its covariance would be made whole, "
            f"for at most {_LARGEST:,}; 'laplace' and 'lowrank' pass theirs on at any size"
        )
    if isinstance(auto, pyro_guides.AutoStructured):
        moments = _structured(auto, shapes)
    elif isinstance(auto, pyro_guides.AutoContinuous) and not isinstance(
        auto, pyro_guides.AutoNormalizingFlow
    ):
        posterior = auto.get_posterior()
        moments = posterior.mean.clone(), posterior.covariance_matrix
    else:
        raise GuideError(
            f"{name} does not say how its posterior becomes a prior; derive your guide from "
            "bhpeft_pyro.guides.Guide and give it distributions()"
        )
    mean, matrix = moments
    return JointPrior(LowRankNormal(mean, Covariance.dense(matrix)), shapes)


def _structured(
    auto: pyro_guides.AutoStructured, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what is linear in standard Normal noise, one entry at a time."""
    conditionals: Any = auto.conditionals  # once it has seen the model, both are mappings
    dependencies: Any = auto.dependencies
    linear = all(each == "linear" for deps in dependencies.values() for each in deps.values())
    if not ({*conditionals.values()} <= {"normal", "mvn"} and linear):
        raise GuideError(
            "AutoStructured becomes a prior where all conditionals are 'normal' or 'mvn' and all "
            f"dependencies 'linear'; got {conditionals} and {dependencies}"
        )
    size = sum(prod(shape) for shape in shapes.values())
    like = next(auto.parameters())
    noise = torch.cat([torch.eye(size), torch.zeros(1, size)]).to(like)
    sizes = {f"{name}_aux": (prod(shape),) for name, shape in shapes.items()}
    with poutine.block(), poutine.condition(data=unpack(noise, sizes)):
        deltas = auto.get_deltas()
    values = torch.cat([deltas[name].v.reshape(size + 1, -1) for name in shapes], 1)
    root = values[:-1] - values[-1]
    return values[-1].clone(), root.mT @ root
