"""Classes, ordered classes, several labels per text, and multiple choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ...base.values import Several, checked_dataclass
from ...peft.sites import Site, zeros
from .likelihood import Likelihood, Outputs

_MOST = 20.0  # of a step's logarithm: under a wide posterior it would overflow


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes, by the softmax of one output for each class.

    >>> Categorical().distribution(Outputs(torch.zeros(2, 4))).probs[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    kind = "class"
    grows = True

    @property
    def softmax(self) -> bool:  # type: ignore[override]
        """Whether only differences between outputs matter; not of any subclass."""
        return type(self) is Categorical

    def num_labels(self, outputs: int) -> int | None:
        return outputs

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        return dist.Categorical(logits=outputs.values)


@checked_dataclass
class OrderedLogistic(Likelihood):
    """Ordered classes such as stars: one output, compared with learnt cutpoints.

    P(label <= k) = sigmoid(cutpoint_k - output): the proportional-odds model (McCullagh 1980). The
    site "cutpoints" (levels - 1,) holds their centre and the logarithms of the steps between them,
    which keeps them in order; a prior around 0 favours neither end.

    Args:
        levels: the number of classes, 0 to levels - 1 in their order.

    Raises:
        ConfigError: `levels` is not a whole number of at least 2.

    >>> likelihood = OrderedLogistic(3)
    >>> weights = {"cutpoints": torch.tensor([0.0, 0.6931472])}
    >>> likelihood.cutpoints(weights).round(decimals=4).tolist()
    [-1.0, 1.0]
    """

    levels: Several
    kind = "class"
    outputs = 1
    ordered = True

    @property
    def sites(self) -> tuple[Site, ...]:
        shape, unit = (self.levels - 1,), torch.ones(1, dtype=torch.float32)
        # Equal shares for an output of 0 would need logit-spaced cutpoints; unit steps centred
        # on 0 are near enough to start from.
        return (Site("cutpoints", shape, ("label",), unit, zeros(shape, unit)),)

    def num_labels(self, outputs: int) -> int | None:
        return self.levels

    def cutpoints(self, weights: Mapping[str, Tensor]) -> Tensor:
        """`(*P, levels - 1)`, increasing."""
        places = functional.pad(_steps(weights).cumsum(-1), (1, 0))
        return weights["cutpoints"][..., :1] + places - places.mean(-1, keepdim=True)

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        above = self.cutpoints(outputs.weights) - outputs.values[..., :1]
        # P(l < x < u) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): in logarithms, as a difference of
        # probabilities near 1 is 0 and has no gradient.
        ends = torch.zeros_like(above[..., :1])
        below_upper = torch.cat([functional.logsigmoid(above), ends], -1)
        above_lower = torch.cat([ends, functional.logsigmoid(-above)], -1)
        steps = _steps(outputs.weights)
        width = (-torch.expm1(-steps)).clamp_min(torch.finfo(steps.dtype).tiny).log()
        logits = below_upper + above_lower + functional.pad(width, (1, 1))
        return dist.Categorical(logits=logits)


def _steps(weights: Mapping[str, Tensor]) -> Tensor:
    """`(*P, levels - 2)`: the distances between cutpoints."""
    return weights["cutpoints"][..., 1:].clamp(-_MOST, _MOST).exp()


@dataclass(frozen=True)
class MultipleChoice(Likelihood):
    """The right one of C texts: one output for each, and the softmax over those that exist.

    >>> scores = torch.tensor([[[0.], [0.], [5.]]])
    >>> exist = torch.tensor([[True, True, False]])
    >>> MultipleChoice().distribution(Outputs(scores, choices=exist)).probs.tolist()
    [[0.5, 0.5, 0.0]]
    """

    kind = "choice"
    outputs = 1

    @property
    def softmax(self) -> bool:  # type: ignore[override]
        """Whether only differences between outputs matter; not of any subclass."""
        return type(self) is MultipleChoice

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        return dist.Categorical(logits=outputs.of_existing(outputs.values[..., 0]))


@dataclass(frozen=True)
class MultiLabel(Likelihood):
    """Any number of labels per text: one output for each label, the logit that the text has it.

    Given the weights, labels are independent.

    >>> MultiLabel().distribution(Outputs(torch.zeros(2, 4))).mean[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    kind = "labels"

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        return dist.Bernoulli(logits=outputs.values).to_event(1)
