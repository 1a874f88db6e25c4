"""Priors: Pyro functions from sites to their tensors."""

from .from_posterior import (
    JOINT,
    JointPrior,
    MixturePrior,
    PosteriorPrior,
    closed,
    closed_form,
    independent_normals,
    unpack,
    with_rows,
)
from .prior import Prior, PriorLike, as_prior, checked, complete
from .scales import FunctionSpaceNormal, default
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
    "closed",
    "closed_form",
    "complete",
    "default",
    "independent_normals",
    "unpack",
    "with_rows",
]
