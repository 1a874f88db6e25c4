"""The scale of the PEFT weights' prior, found by the bound as the posterior is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.optim import Adam

from ..distributions import LowRankNormal
from ..guides import LowRankGuide
from ..model import Model
from ..priors import FunctionSpaceNormal

__all__ = ["Draws", "PriorScale"]

_LR = 0.2  # of the logarithm; the mean's steps are small by the time that there is noise


class Draws(Messenger):
    """Keeps what is drawn from joint Normals, with the gradients that get there."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        draw = msg["value"]
        if isinstance(msg["fn"], LowRankNormal) and draw.requires_grad:
            draw.retain_grad()
            self.kept.append(draw)


class PriorScale(Adam):
    """Adam on the logarithm of a factor of `FunctionSpaceNormal.change`: type-II maximum
    likelihood (MacKay 1992), with the bound in place of the evidence.

    Not centred: weights are the factor times z, which prior and guide are of. So the KL does not
    depend on it, and the bound's slope along its logarithm is that of the log likelihood, the sum
    of z d log p / dz over the weights, at draws of z. There the mean asks for a wider prior, and
    noise that data have not narrowed for less of it. The logarithm itself is N(0, 1) under a
    hyperprior: a first round of few texts is no reason to hold later ones at the transformer.

    Args:
        model: whose network's `Coordinates` carry the factor while it is sought.
        guide: of all latents.

    Attributes:
        draws: to be entered where the loss is evaluated under noise. Without, no step is made.
    """

    def __init__(self, model: Model, guide: LowRankGuide) -> None:
        coordinates = model.network.coordinates
        assert coordinates is not None
        self.model, self.guide, self.coordinates = model, guide, coordinates
        self.draws = Draws()
        self.log = nn.Parameter(torch.zeros(()))
        super().__init__([self.log], lr=_LR)

    @classmethod
    def of(cls, model: Model, guide: object) -> PriorScale | None:
        """None if the scale is given, or nothing has one."""
        prior, coordinates = model.prior, model.network.coordinates
        is_open = isinstance(prior, FunctionSpaceNormal) and prior.change is None
        if is_open and coordinates and coordinates.added and isinstance(guide, LowRankGuide):
            return cls(model, guide)
        return None

    def slope(self) -> Tensor:
        """The loss's along the logarithm, at the draws kept."""
        total = self.log.detach().clone()  # of the hyperprior's -log density
        for draw in self.draws.kept:
            assert draw.grad is not None
            away = self.guide.unpack(draw.detach() - self.guide.prior.loc)
            slopes = self.guide.unpack(draw.grad)
            for name in self.coordinates.added:
                total += (away[name] * slopes[name]).sum().cpu()
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.draws.kept.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.draws.kept:
            self.log.grad = self.slope()
            super().step(closure)
            self.coordinates.gain = self.log.exp().item()
        return None

    def settle(self) -> Model:
        """The model under the prior that was found; the guide becomes one of the weights."""
        prior, network, names = self.model.prior, self.model.network, self.coordinates.added
        assert isinstance(prior, FunctionSpaceNormal)
        start = next(prior.scale(site) for site in network.sites if site.name in names)
        factor, self.coordinates.gain = self.coordinates.gain, 1.0
        self.guide.rescale(names, factor)
        found = replace(prior, change=factor * start)
        model = Model(network, found, self.model.likelihood)
        self.guide.follow(model)
        return model
