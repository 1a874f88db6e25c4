"""Likelihoods: from a network's outputs to a distribution over labels.

Each is a small class with `outputs` (how many numbers the head must give for each example), `sites`
(its own random tensors, real-valued, with a prior like any other) and
`distribution(outputs, weights)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ..checks import Number, check_fields
from ..data.batch import Batch
from ..data.columns import Kind
from ..errors import LikelihoodError
from ..peft.sites import Site, zeros

__all__ = [
    "Categorical",
    "HeteroscedasticNormal",
    "Likelihood",
    "MultipleChoice",
    "Normal",
    "OrderedLogistic",
]


class Likelihood(ABC):
    """p(label | outputs, own weights). For one of your own, derive and define `distribution`.

    Attributes:
        kind: what a label is: "class", "rating" or "choice" (the right one of several texts).
        outputs: how many outputs it needs from the head; None: any number.
        constant_noise: whether labels are a constant plus `unit` times the first output plus Normal
            noise that no output changes. Under Normal weights they are then Normal themselves,
            and predictions have a closed form.
        unit: the size of an output of 1 in the labels' own unit.
        softmax: whether only differences between the outputs matter, those of classes or of
            choices. Derivatives by the weights then take one backward pass less.

    >>> class Counts(Likelihood):
    ...     kind, outputs = "rating", 1
    ...     def distribution(self, outputs, weights, choices=None):
    ...         return dist.Poisson(outputs[..., 0].exp())
    >>> Counts().distribution(torch.zeros(7, 5, 1), {}).batch_shape  # 7 draws, 5 examples
    torch.Size([7, 5])
    """

    kind: Kind
    outputs: int | None = None
    constant_noise: bool = False
    unit: float = 1.0
    softmax: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """The likelihood's own random tensors."""
        return ()

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """Starting values of its sites for a point estimate, given (N,) labels.

        Sites that are left out start as they say themselves.
        """
        return {}

    def standardised(self, labels: Tensor | None) -> Self:
        """The likelihood in the unit of (N,) labels, which `fit` gives it in the first round.

        What its user has given stays. Without labels, it is as without a fit.
        """
        return self

    @abstractmethod
    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        """The distribution of the labels.

        Args:
            outputs: `(*P, B, outputs)`, or `(*P, B, C, outputs)` for C choices, with any particle
                dims P.
            weights: for each of its own sites `(*P, 1, *site.shape)`, or `site.shape` alone.
            choices: (B, C) bool, True where a choice exists; None if all do.

        Returns:
            A distribution of batch shape `(*P, B)`, over classes or choices a `dist.Categorical`.
        """

    def num_labels(self, outputs: int) -> int | None:
        """The number of classes when the head gives `outputs` numbers; None if it is not known.

        By default one output for each class, if there are several.
        """
        return outputs if self.kind == "class" and outputs > 1 else None

    def checked(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        """`distribution`, after a check that it has one label for each example.

        Its own weights may be `(*P, *shape)` or, as `distribution` gets them, `(*P, 1, *shape)`.

        Raises:
            LikelihoodError: the batch shape is another, or classes without a `dist.Categorical`.
        """
        expected = outputs.shape[: -2 if self.kind == "choice" else -1]
        own = dict(weights)
        for site in self.sites:
            value = weights[site.name]
            lead = tuple(value.shape[: value.dim() - site.ndim])
            if lead and (len(lead) < len(expected) or lead[-1] != 1):
                lead = (*lead, 1)  # the place of the examples
                own[site.name] = value.reshape(*lead, *site.shape)
            expected = torch.broadcast_shapes(expected, lead)
        distribution = self.distribution(outputs, own, choices)
        if distribution.batch_shape != expected:
            raise LikelihoodError(
                f"{type(self).__name__}: its distribution has batch shape "
                f"{tuple(distribution.batch_shape)}, expected (*P, B) = {tuple(expected)} for "
                f"outputs of shape {tuple(outputs.shape)}; did you take outputs[..., 0]?"
            )
        if self.kind != "rating" and not isinstance(distribution, torch.distributions.Categorical):
            raise LikelihoodError(
                f"{type(self).__name__}: its distribution is {type(distribution).__name__}; "
                f"expected dist.Categorical over the classes or choices, which kind={self.kind!r} "
                "has (of two classes too: with Head(2))"
            )
        return distribution

    def __call__(self, outputs: Tensor, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """Observe the batch's labels, scaled to the whole data set (N / B), or sample some."""
        distribution = self.checked(outputs, weights, batch.choices)
        shown = distribution.batch_shape[-1]  # B, or B/S where the batch is shared out
        size = len(batch) if batch.size is None else batch.size
        subsample = torch.arange(shown, device=outputs.device)
        with pyro.plate("data", size, subsample=subsample, dim=-1):
            return pyro.sample("label", distribution, obs=batch.labels)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes, by the softmax of one output for each class.

    >>> Categorical().distribution(torch.zeros(2, 4), {}).probs[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    kind, softmax = "class", True

    def num_labels(self, outputs: int) -> int | None:
        return outputs

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        return dist.Categorical(logits=outputs)


@dataclass(frozen=True)
class OrderedLogistic(Likelihood):
    """Ordered classes such as stars: one output, compared with learnt cutpoints.

    P(label <= k) = sigmoid(cutpoint_k - output): the proportional-odds model (McCullagh 1980). The
    site "cutpoints" (levels - 1,) holds their centre and the logarithms of the steps between them,
    which keeps them in order; a prior around 0 favours neither end.

    Args:
        levels: the number of classes, 0 to levels - 1 in their order.

    Raises:
        LikelihoodError: `levels` is not a whole number of at least 2.

    >>> likelihood = OrderedLogistic(3)
    >>> weights = {"cutpoints": torch.tensor([0.0, 0.6931472])}
    >>> likelihood.cutpoints(weights).round(decimals=4).tolist()
    [-1.0, 1.0]
    """

    levels: int
    kind = "class"
    outputs = 1

    def __post_init__(self) -> None:
        levels = Number(least=2, whole=True)
        check_fields(self, {"levels": levels}, "OrderedLogistic", LikelihoodError)

    @property
    def sites(self) -> tuple[Site, ...]:
        shape, unit = (self.levels - 1,), torch.ones(1)
        # Equal shares for an output of 0 would need logit-spaced cutpoints; unit steps centred
        # on 0 are near enough to start from.
        return (Site("cutpoints", shape, ("label",), unit, zeros(shape, unit)),)

    def num_labels(self, outputs: int) -> int | None:
        return self.levels

    def cutpoints(self, weights: Mapping[str, Tensor]) -> Tensor:
        """`(*P, levels - 1)`, increasing."""
        raw = weights["cutpoints"]
        places = functional.pad(raw[..., 1:].exp().cumsum(-1), (1, 0))
        return raw[..., :1] + places - places.mean(-1, keepdim=True)

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        above = self.cutpoints(weights) - outputs[..., :1]
        # P(l < x < u) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): in logarithms, as a difference of
        # probabilities near 1 is 0 and has no gradient.
        ends = torch.zeros_like(above[..., :1])
        below_upper = torch.cat([functional.logsigmoid(above), ends], -1)
        above_lower = torch.cat([ends, functional.logsigmoid(-above)], -1)
        steps = weights["cutpoints"][..., 1:].exp()
        width = (-torch.expm1(-steps)).clamp_min(torch.finfo(steps.dtype).tiny).log()
        logits = below_upper + above_lower + functional.pad(width, (1, 1))
        return dist.Categorical(logits=logits)


@dataclass(frozen=True)
class MultipleChoice(Likelihood):
    """The right one of C texts: one output for each, and the softmax over those that exist.

    >>> scores = torch.tensor([[[0.], [0.], [5.]]])
    >>> exist = torch.tensor([[True, True, False]])
    >>> MultipleChoice().distribution(scores, {}, exist).probs.tolist()
    [[0.5, 0.5, 0.0]]
    """

    kind, softmax = "choice", True
    outputs = 1

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        scores = outputs[..., 0]
        if choices is not None:
            # Draws that share the batch out hold B/S examples each.
            exist = choices.reshape(-1, *scores.shape[-2:]) if scores.dim() > 2 else choices
            scores = scores.masked_fill(~exist, -torch.inf)
        return dist.Categorical(logits=scores)


@dataclass(frozen=True)
class _Ratings(Likelihood):
    """Ratings whose mean is `center` + `spread` times the first output."""

    center: float | None = None
    spread: float | None = None
    kind = "rating"

    def __post_init__(self) -> None:
        rules = {"center": Number(none=True), "spread": Number(above=0, none=True)}
        check_fields(self, rules, type(self).__name__, LikelihoodError)

    @property
    def unit(self) -> float:  # type: ignore[override]
        return 1.0 if self.spread is None else self.spread

    def standardised(self, labels: Tensor | None) -> Self:
        if self.center is not None and self.spread is not None:
            return self
        given = torch.tensor([-1.0, 1.0]) if labels is None else labels.double()
        center = given.mean().item() if self.center is None else self.center
        spread = given.std(correction=0).item() if self.spread is None else self.spread
        return replace(self, center=center, spread=spread or 1.0)  # ratings may all be the same

    def _normal(self, outputs: Tensor, noise: Tensor) -> TorchDistribution:
        return dist.Normal((self.center or 0.0) + self.unit * outputs[..., 0], self.unit * noise)


@dataclass(frozen=True)
class Normal(_Ratings):
    """Ratings with one learnt noise scale for all texts.

    mean = center + spread * output, sd = spread * exp(s) with s the site "noise.log_scale" ().

    Args:
        center, spread: the middle of the ratings and a typical distance from it, in the ratings'
            own unit, so that outputs and their priors are of order one. None is the mean and the
            sd of the ratings that `fit` is given in the first round; without a fit, 0 and 1.

    Raises:
        LikelihoodError: `center` is no finite number, or `spread` no positive one.

    >>> fit = Normal(center=3., spread=2.).distribution(
    ...     torch.zeros(1, 1), {"noise.log_scale": torch.tensor(0.)})
    >>> fit.mean.item(), fit.stddev.item()
    (3.0, 2.0)
    """

    outputs = 1
    constant_noise = True

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """The noise of a constant prediction: the labels' sd."""
        sd = labels.float().std().clamp_min(1e-3 * self.unit)
        return {"noise.log_scale": (sd / self.unit).log()}

    @property
    def sites(self) -> tuple[Site, ...]:
        unit = torch.tensor(1.0)
        return (Site("noise.log_scale", (), (), unit, zeros((), unit)),)

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        return self._normal(outputs, weights["noise.log_scale"].exp())


@dataclass(frozen=True)
class HeteroscedasticNormal(_Ratings):
    """Ratings with a noise scale for each text, which a second output gives.

    mean = center + spread * output_0; sd is spread at output_1 = 0 and grows with output_1.

    Args:
        center, spread: as for `Normal`.

    Raises:
        LikelihoodError: as for `Normal`.

    >>> HeteroscedasticNormal().distribution(torch.zeros(1, 2), {}).stddev.round(decimals=3).item()
    1.0
    """

    outputs = 2

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        # softplus, shifted to give 1 at 0: no overflow, and never exactly 0
        return self._normal(outputs, functional.softplus(outputs[..., 1] + 0.5413248546) + 1e-4)
