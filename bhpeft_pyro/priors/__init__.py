"""Priors: Pyro functions from sites to their tensors."""

from .from_posterior import JOINT, JointPrior, PosteriorPrior, unpack
from .prior import Prior, PriorLike, as_prior, checked, complete
from .ready_priors import FunctionSpaceNormal, Hierarchical, default

__all__ = [
    "JOINT",
    "FunctionSpaceNormal",
    "Hierarchical",
    "JointPrior",
    "PosteriorPrior",
    "Prior",
    "PriorLike",
    "as_prior",
    "checked",
    "complete",
    "default",
    "unpack",
]
