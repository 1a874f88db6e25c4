"""Point-mass guide: the deterministic hybrid, the baseline of every comparison."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to

from ..batch import Batch
from ..errors import GuideError
from ..model import Model
from .guide import Guide, key
from .latent import latents

__all__ = ["DeltaGuide"]


class DeltaGuide(Guide):
    """q(w) a point: fitted at temperature 1 the MAP estimate, at temperature 0 ordinary
    fine-tuning (maximum likelihood).

    Args:
        model: the model whose latents it covers.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> sorted(DeltaGuide(tiny_model())())[-2:]
    ['lora.value.A', 'lora.value.B']
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.loc = nn.ParameterDict()
        self._supports = {}
        for latent in latents(model):
            self._supports[latent.name] = latent.support
            self.loc[key(latent.name)] = nn.Parameter(latent.loc)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
            for name, value in self._values().items()
        }

    def distributions(self) -> dict[str, TorchDistribution]:
        raise GuideError(
            "a point estimate has no width, so it cannot be a prior: fit a 'normal' guide, or go "
            "on from this point without a prior: fit(posterior.model, posterior.guide, data)"
        )

    def means(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        return {
            name: biject_to(support)(self.loc[key(name)])
            for name, support in self._supports.items()
        }
