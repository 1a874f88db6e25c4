"""Priors: stochastic functions from sites to their tensors."""

from .default import FunctionSpaceNormal, default
from .posterior import PosteriorPrior
from .prior import Prior, PriorLike, as_prior, checked

__all__ = [
    "FunctionSpaceNormal",
    "PosteriorPrior",
    "Prior",
    "PriorLike",
    "as_prior",
    "checked",
    "default",
]
