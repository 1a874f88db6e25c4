"""An equal-weight mixture of stochastic functions: independent fits as one guide, or prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from ..errors import GuideError, PriorError
from ..peft.sites import Site
from .from_posterior import PosteriorPrior, apart, unpack
from .prior import Prior, complete

__all__ = ["MIXTURE", "Mixture", "MixturePrior"]

MIXTURE = "mixture"
"""Name of the latent that holds all latents of a mixture."""

_NO_DIMS = torch.Size()
_PLATE = -3  # left of the plates of draws and data


class Mixture(TorchDistribution):
    """p(w) = 1/R sum_r p_r(w), w being all latents of R stochastic functions, as one vector.

    A draw picks a function and runs it; the density is that of the mixture, whichever of the
    functions a draw came from. So it can be the density of a guide, or a prior.

    Args:
        parts: called without arguments, they sample the same latents, all of whose dims are
            event dims: guides or priors.

    Attributes:
        shapes: of the latents, in the order in which they lie in the vector.

    Raises:
        GuideError: on `log_prob`, of a function that holds a latent at a point, or samples
            anything else too.

    >>> import pyro.distributions as dist
    >>> left, right = (partial(pyro.sample, "w", dist.Normal(m, 1.0)) for m in (-3.0, 3.0))
    >>> mixture = Mixture([left, right])
    >>> mixture.log_prob(torch.zeros(1))  # that of either: log N(3; 0, 1)
    tensor(-5.4189)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch declares it
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        parts: Sequence[Callable[[], Any]],
        batch_shape: torch.Size = _NO_DIMS,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        if shapes is None:
            shapes = {name: tuple(value.shape) for name, value in _run(self.parts[0]).items()}
        self.shapes = dict(shapes)
        size = sum(map(math.prod, self.shapes.values()))
        super().__init__(batch_shape, torch.Size([size]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same distribution in another batch shape."""
        return Mixture(self.parts, torch.Size(batch_shape), self.shapes)

    @torch.no_grad()
    def sample(self, sample_shape: Any = _NO_DIMS) -> Tensor:
        shape = self._extended_shape(sample_shape)
        which = torch.randint(len(self.parts), (math.prod(shape[:-1]),))
        order, rows = [], []
        for number, part in enumerate(self.parts):
            chosen = (which == number).nonzero().squeeze(1)
            if len(chosen):
                order.append(chosen)
                rows.append(self._flat(_run(part, len(chosen)), len(chosen)))
        flat = torch.cat(rows)
        return flat[torch.cat(order).argsort().to(flat.device)].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        values = unpack(value, self.shapes)
        densities = [_log_density(part, values) for part in self.parts]
        return torch.stack(densities).logsumexp(0) - math.log(len(densities))

    @property
    def mean(self) -> Tensor:
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Exact where the latents of each part are independent, as those of posteriors are."""
        means, squares = [], []
        for part in self.parts:
            with torch.no_grad(), poutine.block(), poutine.trace() as tracer:
                part()
            mean, variance = (
                self._flat(apart(tracer.trace, take), 1)
                for take in (lambda node: node["fn"].mean, lambda node: node["fn"].variance)
            )
            means.append(mean)
            squares.append(variance + mean.square())
        mean = torch.stack(means).mean(0)
        variance = torch.stack(squares).mean(0) - mean.square()
        shape = self.batch_shape + self.event_shape
        return mean[0].expand(shape), variance[0].expand(shape)

    def _flat(self, values: Mapping[str, Tensor], count: int) -> Tensor:
        return torch.cat([values[name].reshape(count, -1) for name in self.shapes], 1)


def _run(part: Callable[[], Any], count: int | None = None) -> dict[str, Tensor]:
    """The latents of one run, or of `count` at once."""
    with poutine.block(), poutine.trace() as tracer:
        if count is None:
            part()
        else:
            with pyro.plate("runs", count, dim=_PLATE):
                part()
    return apart(tracer.trace)


def _log_density(part: Callable[[], Any], values: Mapping[str, Tensor]) -> Tensor:
    """(*P,) the log density of a stochastic function at latents (*P, *shape)."""
    given = _Given(values)
    with poutine.block(), given:
        part()
    return given.log_density


class _Given(Messenger):
    """Gives every latent its value, a joint one those of its sites, and adds up the densities."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.joint: set[str] = set()
        self.log_density = torch.zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        name, fn = msg["name"], msg["fn"]
        if sites := msg["infer"].get("sites"):
            self.joint |= sites.keys()
            value = torch.cat(
                [_flattened(self.values[name], len(shape)) for name, shape in sites.items()], -1
            )
        elif name in self.joint or (name in self.values and not isinstance(fn, Delta)):
            value = self.values[name]
        else:
            what = "is a point" if name in self.values else "is random, and no latent"
            raise GuideError(f"a mixture's density is not known: {name!r} {what} of a component")
        msg["value"], msg["is_observed"] = value, True
        self.log_density = self.log_density + fn.log_prob(value)


def _flattened(value: Tensor, events: int) -> Tensor:
    return value.reshape(*value.shape[: value.dim() - events], -1)


class MixturePrior:
    """A mixture of posteriors as one prior: 1/R sum_r p_r(w), jointly over all weights.

    Args:
        parts: the posteriors of R fits, as priors.

    >>> import pyro.distributions as dist
    >>> near, far = (PosteriorPrior({"w": dist.Normal(m, 1.0)}) for m in (0.0, 9.0))
    >>> prior = MixturePrior([near, far])
    >>> poutine.trace(prior).get_trace([]).nodes["mixture"]["fn"].mean
    tensor([4.5000])
    """

    name = MIXTURE

    def __init__(self, parts: Sequence[Prior]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        # How sites are made out of other latents is the same in all of them.
        self.structure = first.structure if isinstance(first, PosteriorPrior) else None

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        mixture = Mixture([partial(part, sites) for part in self.parts])
        for site in sites:
            known = mixture.shapes.get(site.name)
            if known != site.shape and not (known is None and self.structure):
                raise PriorError(
                    f"prior: this model's site {site.name!r} has shape {site.shape}, in the "
                    f"earlier posterior {'it has ' + str(known) if known else 'there is none'}"
                )
        infer: Any = {"sites": mixture.shapes}  # a guide has to know what it is made of
        values = unpack(pyro.sample(self.name, mixture, infer=infer), mixture.shapes)
        whole = complete(self, sites, values)
        events = {name: len(shape) for name, shape in mixture.shapes.items()}
        events |= {site.name: site.ndim for site in sites}
        return {
            name: pyro.deterministic(name, whole[name], event_dim=events[name]) for name in events
        }
