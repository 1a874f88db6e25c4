"""Weight draws from a fitted guide, and passes of bounded size under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..base.isolation import alone, seeded
from ..base.progress import tracked
from ..base.values import Count, Seed, checked_call
from ..data.batch import Batch
from ..errors import DataError
from ..forecast.base import join
from ..guides import Guide
from ..guides.guide import guides_of
from ..model.cached_batches import BATCH, MAX_ROWS, CachedBatches, check_all, most_tokens
from ..model.linearized import linear_predictives
from ..model.model import Model
from ..priors import complete, unpack

PLATE = "draws"
TOGETHER = 16
"""Draws that are made together, and take one pass if they are equal."""
_MAX_FEATURES = 2**16  # rows per pass if their features are known

Statistics = Callable[[TorchDistribution, Tensor | None], Sequence[Tensor]]
"""From the distribution of a batch's labels under s draws, (s, B), and the labels (B,) if known, to
the wanted quantities: tensors (s, B, ...)."""


@checked_call
def draw(
    model: Model, guide: Guide | Sequence[Guide], samples: Count, seed: Seed = 0
) -> dict[str, Tensor]:
    """Joint draws of every latent, and of the sites computed from them.

    By site they are detached tensors `(S, 1, *site shape)`; the 1 is the dim of the data plate. For
    the guides of several components S is rounded up to equally many draws of each (`strata`), in
    their order. The global random state does not change.

    Raises:
        ConfigError: an argument that cannot work.
    """
    parts = [part.weights for part in draw_parts(model, guide, samples, seed)]
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
    model: Model, guide: Guide | Sequence[Guide], samples: int, seed: int | torch.Generator
) -> Iterator[Draws]:
    """The draws of `draw` part by part, so that they need not all be in memory.

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
    latents: dict[str, Tensor] = {}
    nodes: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    for name, node in nodes.items():
        value, infer = node["value"].detach(), node["infer"]
        if sites := infer.get("sites"):
            latents |= unpack(value, sites)
        elif not (name in latents or infer.get("is_auxiliary") or site_is_subsample(node)):
            latents[name] = value
    return latents


def linearised_at(model: Model, guide: Guide) -> dict[str, Tensor] | None:
    """The weights around which a guide linearises the network, a tensor of each site's shape; None
    if it does not."""
    if not guide.linear or not model.network.kinds:
        return None
    return {name: value[0, 0].detach() for name, value in point(model, guide).items()}


def strata(guide: Guide | Sequence[Guide], samples: int) -> list[tuple[Guide, int]]:
    """The guide of each component with its number of draws: equally many, and at least `samples` in
    all."""
    guides = guides_of(guide)
    share = -(-samples // len(guides))
    return [(component, share) for component in guides]


def traces(guide: Guide, samples: int, seeds: torch.Generator) -> Iterator[poutine.Trace]:
    """Traces of a guide with (s, 1) draws of every site, under a plate named `PLATE`."""
    fixed = guide.spread_out(samples, seeds)
    for start in range(0, samples, TOGETHER):
        seed = int(torch.randint(2**62, (), generator=seeds))
        some = {k: values[start : start + TOGETHER].unsqueeze(-1) for k, values in fixed.items()}
        with (
            alone(),
            seeded(seed),
            poutine.trace() as tracer,
            poutine.condition(data=some),
            pyro.plate(PLATE, min(TOGETHER, samples - start), dim=-2),
        ):
            guide(None)
        yield tracer.trace


def point(model: Model, guide: Guide) -> dict[str, Tensor]:
    """A guide's central values as a single draw, `(1, 1, *site shape)`. Raises a GuideError if
    there are none."""
    means = {name: value[None, None] for name, value in guide.means().items()}
    with alone():
        return complete(model.prior, model.sites, means)


@torch.inference_mode(False)  # the linearised network needs gradients
@torch.no_grad()
def passes(
    model: Model,
    draws: Iterable[Draws],
    batches: CachedBatches,
    statistics: Statistics,
    *,
    rows: int | None = None,
    bf16: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Evaluate each draw on all N examples: tensors (s, N, ...) on the CPU, some draws at a time.

    Args:
        rows: the largest number of sequences per pass; by default 64, or 65,536 if the
            transformer's features are known.
        bf16: autocast to bfloat16.
    """
    if rows is None:
        rows = MAX_ROWS if batches.features is None else _MAX_FEATURES
    width = batches.examples.width
    texts = max(1, min(BATCH, len(batches.examples), rows // width))
    together = max(1, rows // (texts * width))
    for count, predictive in _together(model, draws, together):

        def run(
            batch: Batch, draws: int = count, of: Callable[[Batch], TorchDistribution] = predictive
        ) -> Sequence[Tensor]:
            return statistics(of(batch).expand(torch.Size((draws, len(batch)))), batch.labels)

        yield by_batch(model, batches, run, size=texts, bf16=bf16)


@torch.inference_mode(False)
@torch.no_grad()
def by_batch(
    model: Model,
    batches: CachedBatches,
    run: Callable[[Batch], Sequence[Tensor]],
    *,
    size: int,
    bf16: bool = False,
) -> tuple[Tensor, ...]:
    """Join the tensors (s, B, ...) that `run` makes of each batch of at most `size` examples.

    Several processes divide the batches. The rest is as for `passes`.
    """
    device = model.network.device

    def check_texts() -> None:
        if batches.features is None:
            check_all(model, data=batches.examples)

    def values(indices: Tensor) -> list[Tensor]:
        batch = batches.batch(indices).to(device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                quantities = [value.cpu() for value in run(batch)]
        except ValueError:  # distributions take no NaN
            check_texts()
            raise
        if any(value.isnan().any() for value in quantities):
            check_texts()
            raise DataError(
                "data: under the weights that were drawn the network's outputs are not finite; "
                "expected a guide whose fit did not diverge, or bf16=False"
            )
        return quantities

    order: list[Tensor] = []
    parts: list[Iterable[Tensor]] = []
    plan = batches.plan(size, most_tokens(device))
    shown = tracked(plan, "", len(plan), share=1.0)
    for indices in shown:
        parts.append(values(indices))
        order.append(indices)
    back = torch.cat(order).argsort()
    return tuple(join([*column], 1)[:, back] for column in zip(*parts, strict=True))


def _together(
    model: Model, draws: Iterable[Draws], together: int
) -> Iterator[tuple[int, Callable[[Batch], TorchDistribution]]]:
    """How many draws take one pass, at most `together` (many more in a linearised network), and
    from a batch to the distribution of its labels under them."""
    for _, group in groupby(draws, lambda part: id(part.at)):  # one network per group
        first = next(group)
        parts = (part.weights for part in chain([first], group))
        if first.at is not None:
            yield from linear_predictives(model, first.at, parts)
            continue
        for part in parts:
            count = max(map(len, part.values()), default=1)
            if not any(value.stride(0) for value in part.values()):
                # All draws are equal: of a point estimate, or of no weights.
                yield count, partial(model.predictive, {k: v[:1] for k, v in part.items()})
                continue
            for start in range(0, count, together):
                weights = {name: value[start : start + together] for name, value in part.items()}
                yield min(together, count - start), partial(model.predictive, weights)
