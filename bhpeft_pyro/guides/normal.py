"""Mean-field Normal guide: an independent Normal for every weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.optim import Optimizer

from ..data.batch import Batch
from ..distributions import Constrained
from ..errors import GuideError
from ..model.model import Model
from ..options import FitOptions
from .budget import Budget
from .guide import Guide, key
from .latent import is_real, latents
from .optimizers import NaturalGradient, natural_lr

__all__ = ["NormalGuide"]


class NormalGuide(Guide):
    """q(w) = prod_i N(w_i | loc_i, scale_i^2), the paper's variational family.

    Each site is sampled from a Normal (Pyro's AutoNormal samples an auxiliary site and a Delta), so
    the KL to a Normal prior has a closed form and adds no noise to the loss. Latents that are not
    real-valued are Normal in unconstrained coordinates.

    Args:
        model: the model whose latents it covers.
        init_scale: the initial sd of every weight. By default sds start at the prior's, and `fit`
            first fits the head and sets the sds of a diagonal Laplace approximation; with an
            `init_scale` it does not.
        names: the latents it covers; by default all.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> NormalGuide(tiny_model()).distributions()["head.bias"].event_shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: Model,
        init_scale: float | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        if init_scale is not None and not 0 < init_scale < torch.inf:
            raise GuideError(f"NormalGuide: init_scale={init_scale} must be positive and finite")
        self.init_scale = init_scale
        self.loc, self.log_scale = nn.ParameterDict(), nn.ParameterDict()
        self._supports = {}
        for latent in latents(model, names):
            scale = latent.scale if init_scale is None else torch.full_like(latent.loc, init_scale)
            self._supports[latent.name] = latent.support
            self.loc[key(latent.name)] = nn.Parameter(latent.loc)
            self.log_scale[key(latent.name)] = nn.Parameter(scale.log())

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {
            name: pyro.sample(name, self._normal(name, self.loc[key(name)]))
            for name in self._supports
        }

    def distributions(self) -> dict[str, TorchDistribution]:
        with torch.no_grad():
            return {
                name: self._normal(name, self.loc[key(name)].clone()) for name in self._supports
            }

    def means(self) -> dict[str, Tensor]:
        return {
            name: biject_to(support)(self.loc[key(name)].detach().clone())
            for name, support in self._supports.items()
        }

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        for name in self._supports.keys() & values.keys():
            inverse = biject_to(self._supports[name]).inv
            self.loc[key(name)].copy_(inverse(values[name]))

    def scales(self) -> dict[str, Tensor]:
        return {name: self.log_scale[key(name)].detach().exp() for name in self._supports}

    @torch.no_grad()
    def narrow(self, information: Mapping[str, Tensor]) -> None:
        if self.init_scale is not None:
            return
        for name, more in information.items():
            if is_real(self._supports.get(name)):
                log_scale = self.log_scale[key(name)]
                log_scale.copy_((torch.exp(-2 * log_scale) + more).log() / -2)

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (means, sds) in rows.items():
            for table, more in ((self.loc, means), (self.log_scale, sds.log())):
                old = table[key(name)]
                table[key(name)] = nn.Parameter(torch.cat([old, more.to(old)]))

    def options(self) -> dict[str, Any]:
        return {"init_scale": self.init_scale}

    @classmethod
    def size(cls, latents: int, shapes: Sequence[tuple[int, ...]], **options: Any) -> Budget:
        return Budget.of(latents, 2 * latents)

    def scale_slopes(self) -> dict[str, Tensor]:
        grads = {name: self.log_scale[key(name)].grad for name in self._supports}
        return {name: grad.mean() for name, grad in grads.items() if grad is not None}

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        pairs = [(self.loc[key(name)], self.log_scale[key(name)]) for name in self._supports]
        return [NaturalGradient(pairs, lr=natural_lr(options, examples))]

    def free_sds(self) -> bool:
        return self.init_scale is None

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        tables = (self.loc, self.log_scale)
        return [table[key(name)] for table in tables for name in self._supports if name in sites]

    def _normal(self, name: str, loc: Tensor) -> TorchDistribution:
        normal = dist.Normal(loc, self.log_scale[key(name)].exp()).to_event(loc.dim())
        support = self._supports[name]
        return normal if is_real(support) else Constrained(normal, support)
