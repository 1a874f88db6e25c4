"""Point estimates: ordinary fine-tuning."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.optim import Adam, Optimizer

from ..data.batch import Batch
from ..distributions import Constrained
from ..errors import GuideError
from ..model.model import Model
from ..options import FitOptions
from .budget import Budget
from .guide import Guide, key
from .latent import is_real, latents
from .optimizers import NOISE_STEPS, adam_lr

__all__ = ["DeltaGuide"]


class DeltaGuide(Guide):
    """A point estimate: at temperature 1 MAP, at temperature 0 maximum likelihood (ordinary
    fine-tuning).

    Args:
        model: the model whose latents it covers.
        width: the sd, in the sites' units, of the next round's prior, a Normal around the point
            estimate. It limits how far a round moves the weights; it is not estimated from data.
            Without it the guide cannot become a prior.
        names: the latents it covers; by default all.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> sorted(DeltaGuide(tiny_model())())[-2:]
    ['lora.value.A', 'lora.value.B']
    """

    point = True

    def __init__(
        self, model: Model, width: float | None = None, names: Collection[str] | None = None
    ) -> None:
        super().__init__()
        if width is not None and not width > 0:
            raise GuideError(f"DeltaGuide: width must be positive, got {width}")
        self.width = width
        self._likelihood = {site.name for site in model.likelihood.sites}
        self.loc = nn.ParameterDict()
        self._supports = {}
        for latent in latents(model, names):
            self._supports[latent.name] = latent.support
            self.loc[key(latent.name)] = nn.Parameter(latent.loc)
        self.follow(model)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
            for name, value in self._values().items()
        }

    def follow(self, model: Model) -> None:
        self._units = {latent.name: latent.unit for latent in latents(model)}

    def distributions(self) -> dict[str, TorchDistribution]:
        if self.width is None:
            raise GuideError(
                "a point estimate has no width, so it cannot be a prior: fit a 'normal' guide, or "
                "give the 'delta' guide a width=... (the sd of the next round's prior, in the "
                "sites' units), or continue from this estimate without a prior: "
                "fit(posterior.model, copy.deepcopy(posterior.guide), data, temperature=0.0)"
            )
        found: dict[str, TorchDistribution] = {}
        for name, support in self._supports.items():
            loc = self.loc[key(name)].detach().clone()
            normal = dist.Normal(loc, self.width * self._units[name].to(loc)).to_event(loc.dim())
            found[name] = normal if is_real(support) else Constrained(normal, support)
        return found

    def means(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._values().items()}

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        for name in self._supports.keys() & values.keys():
            inverse = biject_to(self._supports[name]).inv
            self.loc[key(name)].copy_(inverse(values[name]))

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        lr = adam_lr(options)
        noise = self.parameters_of(self._likelihood)
        rest = self.parameters_of(self._supports.keys() - self._likelihood)
        groups = [(noise, NOISE_STEPS * lr), (rest, lr)]
        return [Adam(group, lr=own) for group, own in groups if group]

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        return [self.loc[key(name)] for name in self._supports if name in sites]

    def options(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def size(cls, latents: int, shapes: Sequence[tuple[int, ...]], **options: Any) -> Budget:
        return Budget.of(latents, latents)

    def _values(self) -> dict[str, Tensor]:
        return {
            name: biject_to(support)(self.loc[key(name)])
            for name, support in self._supports.items()
        }
