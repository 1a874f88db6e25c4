"""Passes of bounded size: many weight draws, many examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..base.distributed import map_over_ranks
from ..base.progress import tracked
from ..data.batch import Batch
from ..errors import DataError
from ..forecast.base import join
from ..model.cached_batches import BATCH, MAX_ROWS, CachedBatches, check_all
from ..model.linearized import linear_predictives
from ..model.model import Model
from .draws import Draws

Statistics = Callable[[TorchDistribution, Tensor | None], Sequence[Tensor]]
"""From the distribution of a batch's labels under s draws, (s, B), and the labels (B,) if known, to
the wanted quantities: tensors (s, B, ...)."""
# A number of draws, and a function from a batch to the distribution of its labels under them.
_Pass = tuple[int, Callable[[Batch], TorchDistribution]]

_MAX_FEATURES = 2**16  # the same if its features are known


@torch.inference_mode(False)  # the linearised network needs gradients
@torch.no_grad()
def passes(
    model: Model,
    draws: Iterable[Draws],
    feed: CachedBatches,
    take: Statistics,
    *,
    rows: int | None = None,
    bf16: bool = False,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Evaluate each draw on all N examples: tensors (s, N, ...) on the CPU, some draws at a time.

    Args:
        rows: the largest number of sequences per pass; by default 64, or 65,536 if the
            transformer's features are known.
        bf16: autocast to bfloat16.
        only: the indices of the examples that are wanted, in order; by default all.
    """
    if rows is None:
        rows = MAX_ROWS if feed.features is None else _MAX_FEATURES
    width, each = feed.examples.width, feed.per_text
    texts = max(1, min(BATCH, -(-len(feed.examples) // each), rows // width))
    together = max(1, rows // (texts * width))
    for count, predictive in _together(model, draws, together):

        def run(
            batch: Batch, draws: int = count, of: Callable[[Batch], TorchDistribution] = predictive
        ) -> Sequence[Tensor]:
            return take(of(batch).expand(torch.Size((draws, len(batch)))), batch.labels)

        yield by_batch(model, feed, run, size=texts * each, bf16=bf16, only=only)


@torch.inference_mode(False)
@torch.no_grad()
def by_batch(
    model: Model,
    feed: CachedBatches,
    run: Callable[[Batch], Sequence[Tensor]],
    *,
    size: int,
    bf16: bool = False,
    only: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Join the tensors (s, B, ...) that `run` makes of each batch of at most `size` examples.

    Several processes divide the batches. The rest is as for `passes`.
    """
    device = model.network.device

    def check_texts() -> None:
        if feed.features is None:
            check_all(model, data=feed.examples)

    def values(item: tuple[Tensor, Batch]) -> list[Tensor]:
        batch = item[1].to(device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = [value.cpu() for value in run(batch)]
        except ValueError:  # distributions take no NaN
            check_texts()
            raise
        if any(value.isnan().any() for value in found):
            check_texts()
            raise DataError(
                "data: under the weights that were drawn the network's outputs are not finite; "
                "expected a guide whose fit did not diverge, or bf16=False"
            )
        return found

    order: list[Tensor] = []
    parts: list[Iterable[Tensor]] = []
    count = -(-(len(feed.examples) if only is None else len(only)) // size)
    batches = tracked(feed.prediction(size, only), "", count, share=1.0)
    for (indices, _), found in map_over_ranks(batches, values):
        parts.append(found)
        order.append(indices)
    back = torch.cat(order).argsort()
    return tuple(join([*each], 1)[:, back] for each in zip(*parts, strict=True))


def _together(model: Model, draws: Iterable[Draws], together: int) -> Iterator[_Pass]:
    """The draws, at most `together` per pass; many more in a linearised network."""
    for _, group in groupby(draws, lambda block: id(block.at)):  # one network per group
        first = next(group)
        blocks = (block.weights for block in chain([first], group))
        if first.at is not None:
            yield from linear_predictives(model, first.at, blocks)
            continue
        for block in blocks:
            count = max(map(len, block.values()), default=1)
            if not any(value.stride(0) for value in block.values()):
                # All draws are equal: of a point estimate, or of no weights.
                yield count, partial(model.predictive, {k: v[:1] for k, v in block.items()})
                continue
            for start in range(0, count, together):
                weights = {name: value[start : start + together] for name, value in block.items()}
                yield min(together, count - start), partial(model.predictive, weights)
