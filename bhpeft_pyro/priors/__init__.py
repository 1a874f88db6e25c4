"""Priors: stochastic functions from sites to their tensors."""

from .from_posterior import JOINT, BlockPrior, JointPrior, PosteriorPrior, apart, joint_name, unpack
from .gates import Gates, gate_probabilities
from .heavy_tailed import Horseshoe, Laplace, StudentT
from .hierarchical import ARD, EmpiricalBayes, Hierarchical, effective_rank, empirical_scales
from .mixture import MixturePrior
from .prior import Prior, PriorLike, as_prior, checked, complete
from .scales import FunctionSpaceNormal, FunctionSpacePrior, default

__all__ = [
    "ARD",
    "JOINT",
    "BlockPrior",
    "EmpiricalBayes",
    "FunctionSpaceNormal",
    "FunctionSpacePrior",
    "Gates",
    "Hierarchical",
    "Horseshoe",
    "JointPrior",
    "Laplace",
    "MixturePrior",
    "PosteriorPrior",
    "Prior",
    "PriorLike",
    "StudentT",
    "apart",
    "as_prior",
    "checked",
    "complete",
    "default",
    "effective_rank",
    "empirical_scales",
    "gate_probabilities",
    "joint_name",
    "unpack",
]
