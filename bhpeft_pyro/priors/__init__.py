"""Priors: Pyro functions from sites to their tensors."""

from .any_prior import (
    earlier_posterior,
    independent_normals,
    joint,
    moved,
    with_fixed_scales,
    with_rows,
    with_structure,
)
from .from_posterior import JOINT, JointPrior, MixturePrior, PosteriorPrior, unpack
from .prior import Prior, PriorLike, as_prior, checked, complete
from .ready_priors import ARD, FunctionSpaceNormal, Gates, Hierarchical, Horseshoe, default

__all__ = [
    "ARD",
    "JOINT",
    "FunctionSpaceNormal",
    "Gates",
    "Hierarchical",
    "Horseshoe",
    "JointPrior",
    "MixturePrior",
    "PosteriorPrior",
    "Prior",
    "PriorLike",
    "as_prior",
    "checked",
    "complete",
    "default",
    "earlier_posterior",
    "independent_normals",
    "joint",
    "moved",
    "unpack",
    "with_fixed_scales",
    "with_rows",
    "with_structure",
]
