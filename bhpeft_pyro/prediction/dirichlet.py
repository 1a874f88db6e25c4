"""A Dirichlet distribution over class probabilities: uncertainty about them as one number a text.

Where one network stands in for many, it gives their mean probabilities and a precision, which says
how much theirs differed (ensemble distribution distillation; Malinin, Mlodozeniec and Gales 2020).
All moments have closed forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.special import digamma

from ..forecast import ClassForecast, LabelsForecast
from ..forecast.classes import entropy
from ..forecast.multilabel import both

_ENDS = (-12.0, 18.0)  # of the precision's logarithm
_BISECTIONS = 50


def class_forecast(probabilities: Tensor, precision: Tensor, **known: Any) -> ClassForecast:
    """Of the mean probabilities (N, C) of a Dirichlet distribution and (N,) the sum of its
    parameters; `known` are labels, texts, label_names and choices."""
    mean = probabilities.double()
    variance = (mean * (1 - mean)).sum(-1) / (precision.double() + 1)
    aleatoric = expected_entropy(mean, precision)
    return ClassForecast.from_moments(mean, aleatoric, variance, **known)


def labels_forecast(probabilities: Tensor, precision: Tensor, **known: Any) -> LabelsForecast:
    """Of (N, K) probabilities each of which has a Beta distribution, with the precision (N,) of its
    text."""
    count = probabilities.shape[1]
    pairs = class_forecast(both(probabilities).flatten(0, 1), precision.repeat_interleave(count))
    return LabelsForecast(pairs=pairs, count=count, **known)


def expected_entropy(probabilities: Tensor, precision: Tensor) -> Tensor:
    """E[H(p)] in nats under a Dirichlet, (...,) in double precision.

    Args:
        probabilities: (..., C) its mean; a class of probability 0 does not exist.
        precision: (...,) the sum of its parameters, positive.

    >>> expected_entropy(torch.tensor([0.5, 0.5]), torch.tensor(2.0))  # p is uniform on [0, 1]
    tensor(0.5000, dtype=torch.float64)
    """
    mean, total = probabilities.double(), precision.double().unsqueeze(-1)
    return (mean * (digamma(total + 1) - digamma(total * mean + 1))).sum(-1)


def precision_for(probabilities: Tensor, epistemic: Tensor) -> Tensor:
    """(N,) float64, the precisions at which labels and probabilities have the mutual information
    `epistemic`.

    Args:
        probabilities: (N, C), or (N, K, C) for K labels a text, over which the information is
            summed.
        epistemic: (N,) in nats, from 0 to the entropy; beyond what a Dirichlet can have, the
            precision is the nearest that is tried, e^-12 to e^18.
    """
    most, wanted = entropy(probabilities.double()), epistemic.double()
    low, high = (torch.full_like(wanted, end) for end in _ENDS)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        at = middle.exp().reshape(-1, *[1] * (most.dim() - 1)).expand_as(most)
        information = (most - expected_entropy(probabilities, at)).reshape(len(wanted), -1).sum(1)
        wider = information < wanted  # a smaller precision is needed
        low, high = torch.where(wider, low, middle), torch.where(wider, middle, high)
    return ((low + high) / 2).exp()
