"""Priors: Pyro functions from sites to their tensors."""

from .from_posterior import (
    JOINT,
    JointPrior,
    MixturePrior,
    PosteriorPrior,
    earlier_posterior,
    independent_normals,
    moved,
    unpack,
    with_fixed_scales,
    with_rows,
)
from .function_space import FunctionSpaceNormal, default
from .prior import Prior, PriorLike, as_prior, checked, complete
from .structured import ARD, Gates, Hierarchical, Horseshoe

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
    "moved",
    "unpack",
    "with_fixed_scales",
    "with_rows",
]
