"""Likelihoods: from a network's outputs to a distribution over labels.

Each is a small class with `outputs` (how many numbers the head must give for each example), `sites`
(its own random tensors, real-valued, with a prior like any other) and
`distribution(outputs)`.
"""

from .categorical import Categorical, MultiLabel, MultipleChoice, OrderedLogistic
from .likelihood import Function, Likelihood, Outputs
from .normal import HeteroscedasticNormal, Normal, StudentT

__all__ = [
    "Categorical",
    "Function",
    "HeteroscedasticNormal",
    "Likelihood",
    "MultiLabel",
    "MultipleChoice",
    "Normal",
    "OrderedLogistic",
    "Outputs",
    "StudentT",
]
