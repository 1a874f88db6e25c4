"""Weight draws from a fitted guide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..base.checks import COUNT, SEED, check_memory
from ..base.threads import alone, seeded
from ..guides import Guide
from ..model.model import Model
from ..priors import complete, unpack

PLATE = "draws"
_BLOCK = 16  # draws made at a time


@contextmanager
def private_rng(seed: int) -> Iterator[None]:
    """`seeded`, whatever other threads do: the random state is global, and they draw from it too.

    So torch's random functions get generators of this block's own. That costs a call of Python for
    every operation, too much for a fit.
    """
    with seeded(seed), _OwnGenerators(seed):
        yield


# Those that distributions call. `randn_like` and its kind take no generator.
_RANDOM = {
    *(torch.normal, torch.randn, torch.rand, torch.randint, torch.randperm),
    *(torch.bernoulli, torch.binomial, torch.multinomial, torch.poisson),
    *(torch._standard_gamma, torch._sample_dirichlet),
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.bernoulli_),
}


class _OwnGenerators(TorchFunctionMode):
    """In this thread, random functions that are given no generator get one, one per device."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM and kwargs.get("generator") is None:
            tensors = [each for each in args if isinstance(each, Tensor)]
            device = tensors[0].device if tensors else kwargs.get("device")
            kwargs = {**kwargs, "generator": self._of(device)}
        return func(*args, **kwargs)

    def _of(self, device: Any) -> torch.Generator:
        device = torch.device(device or torch.get_default_device())
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def draw(model: Model, guide: Guide, samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Joint draws of every latent, and of the sites computed from them.

    By site they are detached tensors `(S, 1, *site shape)`; the 1 is the dim of the data plate. For
    a mixture S is rounded up to equally many draws per component (`strata`), in their order. The
    global random state does not change.

    Raises:
        ConfigError: an argument that cannot work, or more draws than there is memory for.
    """
    samples, seed = COUNT("samples", samples), SEED("seed", seed)
    # Twice: the parts, and the whole that they are put together to.
    check_memory("samples", samples, 8 * sum(site.numel for site in model.sites))
    parts = [block.weights for block in draw_parts(model, guide, samples, seed)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, eq=False)
class Draws:
    """Some weight draws, and the network that they are for.

    Attributes:
        weights: for each latent and site of the model a tensor `(s, 1, *shape)`.
        at: the weights around which the network is linearised, a tensor of each site's shape; None
            for the network itself.
    """

    weights: Mapping[str, Tensor]
    at: Mapping[str, Tensor] | None = None


def draw_parts(
    model: Model, guide: Guide, samples: int, seed: int | torch.Generator
) -> Iterator[Draws]:
    """The draws of `draw` in blocks, so that they need not all be in memory.

    With `samples` of 0 they are the central values of each component. A generator of seeds in place
    of `seed` goes on where the draws of another component have left it.
    """
    seeds = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    for component, share in strata(guide, samples):
        if samples == 0:
            yield Draws(point(model, component))
            continue
        at = linearised_at(model, component)
        for trace in traces(component, share, seeds):
            with alone():
                whole = complete(model.prior, model.sites, _latents(trace))
            yield Draws(whole, at)


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    """The latents in a guide's trace, without auxiliary ones; a joint one is split into sites."""
    found: dict[str, Tensor] = {}
    nodes: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    for name, node in nodes.items():
        value = node["value"].detach()
        if sites := node["infer"].get("sites"):
            found |= unpack(value, sites)
        elif not (name in found or node["infer"].get("is_auxiliary") or site_is_subsample(node)):
            found[name] = value
    return found


def linearised_at(model: Model, guide: Guide) -> dict[str, Tensor] | None:
    """The weights around which a guide linearises the network, a tensor of each site's shape; None
    if it does not."""
    if not guide.linear or not model.network.kinds:
        return None
    return {name: value[0, 0].detach() for name, value in point(model, guide).items()}


def strata(guide: Guide, samples: int) -> list[tuple[Guide, int]]:
    """Each component of a guide with its number of draws: equally many, and at least `samples` in
    all."""
    share = -(-samples // len(guide.components))
    return [(component, share) for component in guide.components]


def traces(guide: Guide, samples: int, seeds: torch.Generator) -> Iterator[poutine.Trace]:
    """Traces of a guide with (s, 1) draws of every site, under a plate named `PLATE`."""
    fixed = guide.spread_out(samples, seeds)
    for start in range(0, samples, _BLOCK):
        own = int(torch.randint(2**62, (), generator=seeds))
        some = {k: values[start : start + _BLOCK].unsqueeze(-1) for k, values in fixed.items()}
        with (
            alone(),
            private_rng(own),
            poutine.trace() as tracer,
            poutine.condition(data=some),
            pyro.plate(PLATE, min(_BLOCK, samples - start), dim=-2),
        ):
            guide(None)
        yield tracer.trace


def point(model: Model, guide: Guide) -> dict[str, Tensor]:
    """A guide's central values as a single draw, `(1, 1, *site shape)`. Raises a GuideError if
    there are none."""
    means = {name: value[None, None] for name, value in guide.means().items()}
    with alone():
        return complete(model.prior, model.sites, means)
