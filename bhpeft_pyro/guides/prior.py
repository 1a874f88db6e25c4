"""A model's prior in the form of a guide, to draw from and to predict with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..model import Model
from .guide import Guide
from .laplace import LaplaceGuide
from .mixture import MixtureGuide

__all__ = ["prior_guide", "prior_like"]


class _LinearPrior(Guide):
    """Predicts with the network linearised around given weights."""

    linear = True

    def __init__(self, draw: Callable[..., Any], around: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self._draw, self._around = draw, around

    def forward(self, batch: object = None) -> dict[str, Tensor]:
        return dict(self._draw(batch))

    def means(self) -> dict[str, Tensor]:
        return self._around()


def prior_guide(
    model: Model, around: Callable[[], dict[str, Tensor]] | None = None
) -> Callable[..., Any]:
    """A model's prior in the form of a guide.

    Args:
        model: the model.
        around: gives the weights around which its network is linearised; by default it is not.
    """

    def draw(batch: object = None) -> Mapping[str, Tensor]:
        return model.prior(model.sites)

    return draw if around is None else _LinearPrior(draw, around)


def prior_like(model: Model, guide: object) -> Callable[..., Any]:
    """The prior of the model that a guide is a posterior of.

    That is of the linearised network where the guide's is, around the guide's own means; of a
    mixture as many draws for each component.
    """
    if isinstance(guide, MixtureGuide) and guide.linear:
        components: list[Any] = [prior_like(model, each) for each in guide.components]
        return MixtureGuide(components)
    if isinstance(guide, LaplaceGuide):
        model = Model(model.network, guide.own_prior(), model.likelihood)
    return prior_guide(model, guide.means if isinstance(guide, Guide) and guide.linear else None)
