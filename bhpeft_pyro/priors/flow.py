"""A normalising flow over all weights at once as a prior, and how one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_transform import ComposeTransformModule, TransformModule
from pyro.distributions.transforms import affine_autoregressive, iterated
from torch import Tensor
from torch.distributions import constraints

from .from_posterior import JOINT, VectorPrior

__all__ = ["FlowPrior", "placed_flow"]


class Placed(TransformModule):
    """x -> loc + scale x: where a flow starts, and how wide."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        # Remembered, as the flow before it remembers: else a draw's density, which goes back from
        # where the draw ended, costs a pass of the network for each weight.
        super().__init__(cache_size=1)
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.loc: Tensor
        self.scale: Tensor

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.scale * x

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.loc) / self.scale

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale.log().sum().expand(x.shape[:-1])


def placed_flow(
    loc: Tensor,
    scale: Tensor,
    hidden_dim: Sequence[int] | None = None,
    num_transforms: int = 1,
    **options: Any,
) -> ComposeTransformModule:
    """Inverse autoregressive flows (Kingma et al. 2016), then loc + scale x.

    Args:
        loc, scale: (D,).
        hidden_dim: widths of the hidden layers, each at least D; by default one of 3 D + 1.
        num_transforms: so many flows.
        options: of Pyro's `affine_autoregressive`.
    """
    flows = iterated(num_transforms, affine_autoregressive, len(loc), hidden_dim, **options)
    return ComposeTransformModule([*flows, Placed(loc, scale)]).to(loc.device)


class FlowPrior(VectorPrior):
    """The posterior of a flow guide as a prior, by its density.

    A density costs D passes of the flow's network, one a weight.

    Args:
        options: those of `placed_flow` that made the flow.
        state: of the flow's tensors.
        shapes, name: as for `VectorPrior`.

    >>> flow = placed_flow(torch.zeros(3), torch.ones(3), hidden_dim=[4])
    >>> prior = FlowPrior({"hidden_dim": [4]}, flow.state_dict(), {"head.bias": (3,)})
    >>> sorted(prior([]))
    ['head.bias']
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        state: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        name: str = JOINT,
    ) -> None:
        size = sum(prod(shape) for shape in shapes.values())
        like = next(iter(state.values()))
        self.options = dict(options)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            self.flow = placed_flow(torch.zeros(size), torch.ones(size), **options)
        self.flow.to(like.device).requires_grad_(False).load_state_dict(dict(state))
        super().__init__(self._distribution(size, like.device), shapes, name)

    def _distribution(self, size: int, device: torch.device) -> TorchDistribution:
        base = dist.Normal(torch.zeros(size, device=device), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [*self.flow])
