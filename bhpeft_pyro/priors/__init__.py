"""Priors: stochastic functions from sites to their tensors."""

from .ard import ARD, effective_rank
from .blocks import BlockPrior
from .default import FunctionSpaceNormal, default
from .flow import FlowPrior
from .gates import Gates, gate_probabilities
from .heavy import Laplace, StudentT
from .hierarchical import EmpiricalBayes, Hierarchical, empirical_scales
from .horseshoe import Horseshoe
from .joint import JOINT, JointPrior, VectorPrior, apart, joint_name, unpack
from .mixture import MixturePrior
from .posterior import PosteriorPrior
from .prior import Prior, PriorLike, as_prior, checked, complete
from .scales import FunctionSpacePrior

__all__ = [
    "ARD",
    "JOINT",
    "BlockPrior",
    "EmpiricalBayes",
    "FlowPrior",
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
    "VectorPrior",
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
