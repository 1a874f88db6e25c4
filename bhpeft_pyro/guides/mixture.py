"""A mixture of guides, each of an independent fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import GuideError
from ..priors import MixturePrior
from .guide import Guide, is_linear, is_point

__all__ = ["MixtureGuide"]


class MixtureGuide(Guide):
    """q(w) = 1/K sum_k q_k(w). With point estimates this is a deep ensemble (Lakshminarayanan et
    al. 2017), otherwise a mixture of posteriors (Wilson and Izmailov 2020).

    A call runs one component, chosen at random. Predictions use equally many draws of each.

    Args:
        components: guides of the same model, at least one.

    Raises:
        GuideError: there are no components.

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
        self.parts = nn.ModuleList(components)

    @property
    def components(self) -> Sequence[Any]:
        return [*self.parts]

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether each component is a posterior of the network linearised around its own mean."""
        return all(map(is_linear, self.parts))

    @property
    def point(self) -> bool:  # type: ignore[override]
        """Whether SVI trains point estimates only."""
        return all(map(is_point, self.parts))

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        drawn: dict[str, Tensor] = self.parts[int(torch.randint(len(self.parts), ()))](batch)
        return drawn

    def distributions(self) -> dict[str, TorchDistribution]:
        raise GuideError("a mixture has no distributions by site; its components do")

    def as_prior(self) -> MixturePrior:
        return MixturePrior([guide.as_prior() for guide in self._guides()])

    def means(self) -> dict[str, Tensor]:
        """The mean of the components' central values; `predict(samples=0)` uses each of them."""
        found = [guide.means() for guide in self._guides()]
        return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}

    def _guides(self) -> list[Guide]:
        guides = [each for each in self.parts if isinstance(each, Guide)]
        if len(guides) < len(self.parts):
            raise GuideError(
                f"a mixture of {type(self.parts[0]).__name__} has no prior and no means; expected "
                "components that are a bhpeft_pyro.guides.Guide"
            )
        return guides
