"""Passes of bounded size: many weight draws, many examples.

`Feed` makes the batches, and computes only once what does not depend on PEFT weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..checks import shown
from ..data import Examples
from ..data.batch import Batch, shuffled
from ..data.tokens import Tokens
from ..distributed import agree, spread
from ..errors import DataError
from ..forecast.base import join
from ..guides.guide import is_linear
from ..model.head import check_features
from ..model.linearized import linear_predictives
from ..model.model import Model
from ..model.network import RandomPEFT
from .draws import completed, point, strata

__all__ = [
    "BATCH",
    "Block",
    "Feed",
    "Take",
    "by_batch",
    "centre",
    "check_all",
    "check_rows",
    "drawn",
    "naming_rows",
    "not_finite",
    "passes",
]

Take = Callable[[TorchDistribution, Tensor | None], Sequence[Tensor]]
"""From the distribution of a batch's labels under s draws, (s, B), and the labels (B,) if known, to
the wanted quantities: tensors (s, B, ...)."""
# A number of draws, and a function from a batch to the distribution of its labels under them.
_Pass = tuple[int, Callable[[Batch], TorchDistribution]]

BATCH = 32
"""Texts per pass of a single draw."""
_MAX_ROWS = 64  # sequences per pass of the transformer
_MAX_FEATURES = 2**16  # the same if its features are known
_MAX_STATES = 2**30  # bytes of hidden states that are kept for a data set


@dataclass(frozen=True, eq=False)
class Block:
    """Some weight draws, and the network that they are for.

    Attributes:
        weights: for each site of the model a tensor `(s, 1, *shape)`.
        at: the weights around which the network is linearised, a tensor of each site's shape; None
            for the network itself.
    """

    weights: Mapping[str, Tensor]
    at: Mapping[str, Tensor] | None = None


def drawn(
    model: Model,
    guide: Callable[..., Any],
    samples: int,
    seed: int | torch.Generator,
) -> Iterator[Block]:
    """The draws of `draw` in blocks, each for the network that its guide is a posterior of.

    Args:
        model, guide: as for `draw`.
        samples: as for `draw`; 0 for the central values of each component.
        seed: as for `draw`; or the generator of seeds, which draws component by component share.
    """
    seeds = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    for component, share in strata(guide, samples):
        if samples == 0:
            yield Block(point(model, component))
            continue
        at = centre(model, component)
        for weights in completed(model, component, share, seeds):
            yield Block(weights, at)


def centre(model: Model, guide: Callable[..., Any]) -> dict[str, Tensor] | None:
    """The weights around which a guide linearises the network, a tensor of each site's shape; None
    if it does not."""
    if not is_linear(guide) or not model.network.kinds:
        return None
    return {name: value[0, 0].detach() for name, value in point(model, guide).items()}


@torch.inference_mode(False)  # the linearised network needs gradients
@torch.no_grad()
def passes(
    model: Model,
    draws: Iterable[Block],
    feed: Feed,
    take: Take,
    *,
    rows: int | None = None,
    bf16: bool = False,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Evaluate each draw on all examples, some draws at a time.

    Args:
        model: the model.
        draws: consumed as they are needed.
        feed: N examples.
        take: computes the wanted quantities.
        rows: the largest number of sequences per pass; by default 64, or 65,536 if the
            transformer's features are known.
        bf16: autocast to bfloat16.
        only: the indices of the N examples that are wanted, in order; by default all.

    Yields:
        Tensors (s, N, ...) on the CPU, in the examples' order.
    """
    if rows is None:
        rows = _MAX_ROWS if feed.features is None else _MAX_FEATURES
    width, each = feed.examples.width, feed.per_text
    texts = max(1, min(BATCH, -(-len(feed.examples) // each), rows // width))
    together = max(1, rows // (texts * width))
    for count, predictive in _together(model, draws, together):

        def run(
            batch: Batch,
            draws: int = count,
            of: Callable[[Batch], TorchDistribution] = predictive,
        ) -> Sequence[Tensor]:
            return take(of(batch).expand(torch.Size((draws, len(batch)))), batch.labels)

        yield by_batch(model, feed, run, size=texts * each, bf16=bf16, only=only)


@torch.inference_mode(False)
@torch.no_grad()
def by_batch(
    model: Model,
    feed: Feed,
    run: Callable[[Batch], Sequence[Tensor]],
    *,
    size: int,
    bf16: bool = False,
    only: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute tensors batch by batch and join them; several processes divide the batches.

    Args:
        model, feed, bf16, only: as for `passes`.
        run: from a batch on the model's device to tensors (s, B, ...).
        size: the most examples in a batch.

    Returns:
        Tensors (s, N, ...) on the CPU, in the examples' order.
    """
    device = model.network.device

    def values(item: tuple[Tensor, Batch]) -> list[Tensor]:
        indices, batch = item[0], item[1].to(device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = [value.cpu() for value in run(batch)]
        except ValueError:  # distributions take no NaN
            check_rows(model, feed.examples, indices, batch)
            raise
        if any(value.isnan().any() for value in found):
            check_rows(model, feed.examples, indices, batch)
            raise DataError(
                "data: under the weights that were drawn the network's outputs are not finite; "
                "expected a guide whose fit did not diverge, or bf16=False"
            )
        return found

    order: list[Tensor] = []
    parts: list[Iterable[Tensor]] = []
    for (indices, _), found in spread(feed.prediction(size, only), values):
        parts.append(found)
        order.append(indices)
    back = torch.cat(order).argsort()
    return tuple(join([*each], 1)[:, back] for each in zip(*parts, strict=True))


def check_rows(
    model: Model, examples: Examples, rows: Tensor, batch: Batch, what: str = "data"
) -> None:
    """Name the texts of which the frozen transformer makes numbers that are not finite, if a batch
    has one.

    Args:
        model: the model.
        examples: all examples.
        rows: (B,) the numbers of those in the batch.
        batch: the batch.
        what: the argument that they came in.

    Raises:
        DataError: there is one.
    """
    if batch.features is None and _bad_rows(model, rows, batch):
        check_all(model, **{what: examples})


def check_all(model: Model, **sources: Examples | None) -> None:
    """Name all such texts of whole data sets, by the names of the arguments that they came in."""
    for what, examples in sources.items():
        if examples is None:
            continue
        batches = examples.by_length(BATCH * examples.per_text)
        bad = sorted(chain.from_iterable(_bad_rows(model, rows, batch) for rows, batch in batches))
        if bad:
            text = examples.texts[bad[0]]
            raise not_finite(what, examples.rows[bad].unique().tolist(), text)


def not_finite(what: str, rows: Sequence[int], text: str) -> DataError:
    """The error that names such rows, and the text of the first of them."""
    first, *others = rows
    more = f" (and of rows {', '.join(map(str, others[:3]))}{' ...' * (len(others) > 3)})"
    return DataError(
        f"{what}, row {first}: of {shown(text)}{more if others else ''} the backbone makes numbers "
        "that are not finite; drop the row, or load the backbone with dtype=torch.float32",
        rows=rows,
    )


def _bad_rows(model: Model, rows: Tensor, batch: Batch) -> list[int]:
    bad = ~model.network.features(batch.to(model.network.device)).isfinite().all(-1).cpu()
    if batch.choices is not None:
        bad = (bad & batch.choices.cpu()).any(-1)
    found: list[int] = rows[bad].tolist()
    return found


@contextmanager
def naming_rows(model: Model, **sources: Examples | None) -> Iterator[None]:
    """Where numbers that are not finite end a fit, name the row that is the cause, if one is."""
    try:
        yield
    except (RuntimeError, ValueError):
        check_all(model, **sources)
        raise


def _together(model: Model, draws: Iterable[Block], together: int) -> Iterator[_Pass]:
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


class Feed:
    """Training and prediction batches of a data set.

    Without PEFT weights the transformer's features never change. They are computed once, so that a
    head-only fit costs no more than the head. With PEFT weights in the upper layers alone, the
    hidden states below them never change. These too are computed once, unless they would take more
    than 1 GiB: then all layers are run each time.

    Args:
        model: the model.
        examples: the data set.
        frozen: compute the features once even if there are PEFT weights.
        batch_size: of this computation.
        weights: the PEFT weights held fixed in it, one tensor per site; None leaves them out.

    Attributes:
        features: (N, D) or, with C choices, (N, C, D); None if they are not computed once.
        states: (total, D) the hidden states of each token of `examples.tokens` at the first layer
            with PEFT weights; None if they are not computed once.
    """

    def __init__(
        self,
        model: Model,
        examples: Examples,
        frozen: bool = False,
        batch_size: int = 64,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.examples = examples
        self.features: Tensor | None = None
        self.states: Tensor | None = None
        given = (examples.tokens.ids, examples.tokens.lengths, examples.labels, examples.words)
        agree("data", *(each for each in given if each is not None))
        network = model.network
        if frozen or not network.kinds:
            self._compute(model, batch_size, weights)
        elif network.attachment.constant:
            self.states = _constant_states(network, examples.tokens, batch_size)

    @property
    def per_text(self) -> int:
        """How many examples a text has, which share its pass; 1 if features are computed once."""
        return self.examples.per_text if self.features is None else 1

    def whole(self) -> Batch:
        """All examples as one batch, if features are computed."""
        return self._batch(torch.arange(len(self.examples)))

    def training(
        self, batch_size: int, particles: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """One epoch of shuffled batches, each split over particles."""
        if self.features is None:
            yield from (
                batch.split(particles)
                for batch in self.examples.batches(
                    batch_size,
                    shuffle=True,
                    generator=generator,
                    multiple_of=particles,
                    states=self.states,
                )
            )
            return
        alike = torch.zeros(len(self.examples), dtype=torch.long)
        for indices in shuffled(alike, batch_size, particles, generator):
            yield self._batch(indices).split(particles)

    def prediction(
        self, batch_size: int, only: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Batches with every example once, or with those of the indices `only`; and the indices."""
        if self.features is None:
            yield from self.examples.by_length(batch_size, self.states, only)
            return
        wanted = torch.arange(len(self.examples)) if only is None else only
        for indices in wanted.split(batch_size):
            yield indices, self._batch(indices)

    def _batch(self, indices: Tensor) -> Batch:
        assert self.features is not None
        labels, choices = self.examples.labels, self.examples.choices
        return Batch(
            {},
            None if labels is None else labels[indices],
            size=len(self.examples),
            choices=None if choices is None else choices[indices],
            features=self.features[indices],
            extra={name: values[indices] for name, values in self.examples.extra.items()},
        )

    def _compute(self, model: Model, batch_size: int, weights: Mapping[str, Tensor] | None) -> None:
        held = () if weights is None else (weights,)

        def features_of(item: tuple[Tensor, Batch]) -> list[Tensor]:
            indices, batch = item[0], item[1].to(model.network.device)
            features = model.network.features(batch, *held).cpu()
            try:
                return [check_features(features)]
            except DataError:
                check_rows(model, self.examples, indices, batch)
                raise

        batches = self.examples.by_length(batch_size * self.per_text)
        parts = [(indices, *own) for (indices, _), own in spread(batches, features_of)]
        # Examples come with the most choices first, so the first batch is the widest.
        self.features = torch.zeros(len(self.examples), *parts[0][1].shape[1:])
        for indices, features in parts:
            self.features[indices, : features.shape[1]] = features


@torch.inference_mode(False)  # they enter passes with gradients
def _constant_states(network: RandomPEFT, tokens: Tokens, batch_size: int) -> Tensor | None:
    """The `states` of a `Feed`."""
    total, states = int(tokens.lengths.sum()), None
    for rows in tokens.lengths.argsort(descending=True).split(batch_size):
        own = network.constant_states(Batch(tokens.padded(rows)).to(network.device))
        assert own is not None
        if total * own[0, 0].nbytes > _MAX_STATES:
            return None
        if states is None:
            states = own.new_empty(total, own.shape[-1], device="cpu")
        at, real = tokens.places(rows)
        states[at[real]] = own.cpu()[real]
    return states
