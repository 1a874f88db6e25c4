"""A mixture of guides: what independent fits are together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from ..priors import MixturePrior, unpack
from ..priors.mixture import MIXTURE, Mixture
from .guide import Guide

__all__ = ["MixtureGuide"]


class MixtureGuide(Guide):
    """q(w) = 1/R sum_r q_r(w): a deep ensemble where the components are points (Lakshminarayanan et
    al. 2017), a mixture of posteriors where they have widths (Wilson and Izmailov 2020).

    Its density is that of the mixture, whichever component a draw came from. Predictions take
    equally many draws of each component instead of as many as chance gives it.

    Args:
        components: guides of the same model: this package's, Pyro's, or functions.

    Raises:
        GuideError: there are none; and where its density is asked for, if a component is a point
            or one of Pyro's autoguides.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> from bhpeft_pyro.guides import NormalGuide
    >>> model = tiny_model(())
    >>> guide = MixtureGuide([NormalGuide(model), NormalGuide(model)])
    >>> guide()["head.bias"].shape, len(guide.components)
    (torch.Size([2]), 2)
    """

    def __init__(self, components: Sequence[nn.Module]) -> None:
        super().__init__()
        if not components:
            raise GuideError("MixtureGuide: components is empty; expected at least one guide")
        self.components = nn.ModuleList(components)
        self._joint = False

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether each component is of a network linearised around its own mean."""
        return all(isinstance(each, Guide) and each.linear for each in self.components)

    @property
    def point(self) -> bool:  # type: ignore[override]
        """Whether SVI trains points only."""
        return all(isinstance(each, Guide) and each.point for each in self.components)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        mixture = Mixture([partial(component, batch) for component in self.components])
        infer: Any = {"is_auxiliary": not self._joint, "sites": mixture.shapes}
        values = unpack(pyro.sample(MIXTURE, mixture, infer=infer), mixture.shapes)
        if self._joint:
            return values
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=len(mixture.shapes[name])))
            for name, value in values.items()
        }

    def follow(self, model: Model) -> None:
        """Under a mixture of priors all latents are one; the components follow their own priors."""
        self._joint = isinstance(model.prior, MixturePrior)

    def distributions(self) -> dict[str, TorchDistribution]:
        raise GuideError(
            "a mixture is not independent between sites: it has no distribution for each, only a "
            "joint one (as_prior), and its components theirs"
        )

    def as_prior(self) -> MixturePrior:
        return MixturePrior([guide.as_prior() for guide in self._guides()])

    def means(self) -> dict[str, Tensor]:
        """The mean of the components' central values; `predict(samples=0)` looks at each."""
        found = [guide.means() for guide in self._guides()]
        return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}

    def _guides(self) -> list[Guide]:
        guides = [each for each in self.components if isinstance(each, Guide)]
        if len(guides) < len(self.components):
            raise GuideError(
                f"a mixture of {type(self.components[0]).__name__} has no prior and no means: "
                "expected components that are a bhpeft_pyro.guides.Guide"
            )
        return guides
