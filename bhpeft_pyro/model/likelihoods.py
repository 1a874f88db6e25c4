"""Likelihoods: from a network's outputs to a distribution over labels.

Each is a small class with `outputs` (numbers the head must give per example), `sites` (its own
random tensors, real-valued, with a prior like any other) and `distribution(outputs, weights)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ..data.batch import Batch
from ..data.columns import Kind
from ..errors import LikelihoodError
from ..peft.sites import Site
from ..plain import make_plain

__all__ = [
    "Categorical",
    "HeteroscedasticNormal",
    "Likelihood",
    "MultipleChoice",
    "Normal",
    "OrderedLogistic",
]


class Likelihood(ABC):
    """p(label | outputs, own weights); subclass it and give `distribution` for one of your own."""

    kind: Kind
    outputs: int | None = None  # None: any number
    constant_noise: bool = False
    """Whether labels are Normal around `unit` times the first output, plus a constant, with a noise
    of their own that no output changes: under Normal weights they are then Normal themselves."""
    unit: float = 1.0

    @property
    def sites(self) -> tuple[Site, ...]:
        """The likelihood's own random tensors."""
        return ()

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """Where a point starts its sites, given (N,) labels; where left out, as the site says."""
        return {}

    @abstractmethod
    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        """The distribution of labels, of batch shape `(*P, B)`, from `(*P, B, outputs)`."""

    def labels(self, outputs: int) -> int | None:
        """The number of classes when the head gives `outputs` numbers; None if that is not known.

        By default one output a class, if there are several.
        """
        return outputs if self.kind == "class" and outputs > 1 else None

    def checked(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        """`distribution`, whose batch shape is seen to be one label an example.

        Its own weights may be `(*P, *shape)` or, as `distribution` gets them, `(*P, 1, *shape)`.

        Raises:
            LikelihoodError: the batch shape is another.
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
    """Classes, by the softmax of one output a class.

    >>> Categorical().distribution(torch.zeros(2, 4), {}).probs[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    kind = "class"

    def labels(self, outputs: int) -> int | None:
        return outputs

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        return dist.Categorical(logits=outputs)


@dataclass(frozen=True)
class OrderedLogistic(Likelihood):
    """Ordered classes such as stars: one output against `levels` - 1 learnt cutpoints.

    The cutpoints (McCullagh 1980, the proportional-odds model) are kept in order by learning their
    centre and the logarithms of the steps between them: a prior of either around 0 favours neither
    end of the levels.

    Args:
        levels: the number of classes.

    >>> likelihood = OrderedLogistic(3)
    >>> weights = {"cutpoints": torch.tensor([0.0, 0.6931472])}
    >>> likelihood.cutpoints(weights).round(decimals=4).tolist()
    [-1.0, 1.0]
    """

    levels: int
    kind = "class"
    outputs = 1

    def __post_init__(self) -> None:
        make_plain(self)
        if not isinstance(self.levels, int) or self.levels < 2:
            raise LikelihoodError(
                f"OrderedLogistic: levels={self.levels!r} must be a whole number, 2 or more"
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        shape = (self.levels - 1,)
        # Equal shares for an output of 0 would need logit-spaced cutpoints; unit steps centred
        # on 0 are near enough to start from.
        return (
            Site("cutpoints", shape, ("label",), torch.ones(1), init=lambda: torch.zeros(shape)),
        )

    def labels(self, outputs: int) -> int | None:
        return self.levels

    def cutpoints(self, weights: Mapping[str, Tensor]) -> Tensor:
        """`(*P, levels - 1)`, increasing."""
        raw = weights["cutpoints"]
        places = functional.pad(raw[..., 1:].exp().cumsum(-1), (1, 0))
        return raw[..., :1] + places - places.mean(-1, keepdim=True)

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        cutpoints = self.cutpoints(weights)
        predictor = outputs[..., 0]
        # P(l < x < u) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): in logarithms, as a difference of
        # probabilities near 1 is 0 and has no gradient.
        above = cutpoints - predictor.unsqueeze(-1)
        ends = torch.zeros_like(above[..., :1])
        below_upper = torch.cat([functional.logsigmoid(above), ends], -1)
        above_lower = torch.cat([ends, functional.logsigmoid(-above)], -1)
        steps = weights["cutpoints"][..., 1:].exp()
        width = (-torch.expm1(-steps)).clamp_min(torch.finfo(steps.dtype).tiny).log()
        logits = below_upper + above_lower + functional.pad(width, (1, 1))
        return dist.Categorical(logits=logits)


@dataclass(frozen=True)
class MultipleChoice(Likelihood):
    """One output a choice, softmax over the choices that exist.

    >>> scores = torch.tensor([[[0.], [0.], [5.]]])
    >>> exist = torch.tensor([[True, True, False]])
    >>> MultipleChoice().distribution(scores, {}, exist).probs.tolist()
    [[0.5, 0.5, 0.0]]
    """

    kind = "choice"
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
class Normal(Likelihood):
    """Ratings with one learnt noise scale for all.

    Args:
        center, spread: the outputs are in units of `spread` around `center`, so that they and
            their priors are of order one whatever the ratings' own scale.

    >>> fit = Normal(center=3., spread=2.).distribution(
    ...     torch.zeros(1, 1), {"noise.log_scale": torch.tensor(0.)})
    >>> fit.mean.item(), fit.stddev.item()
    (3.0, 2.0)
    """

    center: float = 0.0
    spread: float = 1.0
    kind = "rating"
    outputs = 1
    constant_noise = True

    def __post_init__(self) -> None:
        _check_scale(self)

    @property
    def unit(self) -> float:  # type: ignore[override]
        return self.spread

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """The noise at what a constant leaves of the labels' spread."""
        sd = labels.float().std().clamp_min(1e-3 * self.spread)
        return {"noise.log_scale": (sd / self.spread).log()}

    @property
    def sites(self) -> tuple[Site, ...]:
        return (
            Site("noise.log_scale", (), (), unit=torch.tensor(1.0), init=lambda: torch.zeros(())),
        )

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        mean = self.center + self.spread * outputs[..., 0]
        return dist.Normal(mean, self.spread * weights["noise.log_scale"].exp())


@dataclass(frozen=True)
class HeteroscedasticNormal(Likelihood):
    """Ratings whose noise scale depends on the text: a second output gives it.

    Args:
        center, spread: as for `Normal`; an output of 0 means a noise scale of `spread`.

    >>> HeteroscedasticNormal().distribution(torch.zeros(1, 2), {}).stddev.round(decimals=3).item()
    1.0
    """

    center: float = 0.0
    spread: float = 1.0
    kind = "rating"
    outputs = 2

    def __post_init__(self) -> None:
        _check_scale(self)

    def distribution(
        self, outputs: Tensor, weights: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> TorchDistribution:
        mean = self.center + self.spread * outputs[..., 0]
        # softplus, shifted to give 1 at 0: no overflow, and never exactly 0
        scale = functional.softplus(outputs[..., 1] + 0.5413248546) + 1e-4
        return dist.Normal(mean, self.spread * scale)


def _check_scale(likelihood: Normal | HeteroscedasticNormal) -> None:
    """And make plain numbers of NumPy's, which cannot be saved."""
    for name in ("center", "spread"):
        object.__setattr__(likelihood, name, float(getattr(likelihood, name)))
    if not likelihood.spread > 0:
        raise LikelihoodError(
            f"{type(likelihood).__name__}: spread must be positive, got {likelihood.spread}"
        )
