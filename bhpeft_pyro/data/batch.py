"""A mini-batch, which is what `Model` is called with, and which examples go together in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """B tokenised examples that stand for a data set of `size` examples.

    Attributes:
        inputs: tensors for the transformer (`input_ids`, `attention_mask`, ...), each (B, T), or
            (B, C, T) for multiple choice with C choices an example. May be empty if `features`
            are given.
        labels: (B,) class or choice indices (int64) or ratings (float), or (B, K) several labels
            (float, 0 or 1); None when predicting.
        size: N, the number of examples in the data set this mini-batch is drawn from; the
            likelihood is scaled by N / B. None means that the batch is the data set.
        choices: (B, C) bool, True where a choice exists (multiple choice only).
        features: (B, D) or (B, C, D) pooled features of the frozen transformer. They replace
            `inputs`, and PEFT weights have no effect on them.
        states: (B, T, D) or (B, C, T, D) the hidden states of `inputs` at the first layer with PEFT
            weights (`RandomPEFT.constant_states`); the layers below it are then skipped.
        extra: further columns of the data by name, (B,) each, which the likelihood may read.
        particles: the number of weight draws that share the batch. With 1 every draw sees all B
            examples; with S the s-th draw sees the s-th B/S examples.

    >>> batch = Batch({"input_ids": torch.ones(4, 3, dtype=torch.long)}, torch.zeros(4), size=100)
    >>> len(batch), batch.split(2).labels.shape
    (4, torch.Size([2, 2]))
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    size: int | None = None
    choices: Tensor | None = None
    features: Tensor | None = None
    states: Tensor | None = None
    particles: int = 1
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """B, the number of examples, however many particles share them."""
        values = next(iter(self.inputs.values())) if self.features is None else self.features
        return values.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B,) or (B, C), with B/S in place of B where S particles share the examples."""
        value = next(iter(self.inputs.values())) if self.features is None else self.features
        return len(self) // self.particles, *value.shape[1:-1]

    def rows(self, particles: int) -> dict[str, Tensor]:
        """The inputs of `particles` draws as (R, T) rows, draw by draw."""
        if not self.inputs:
            raise DataError("batch: it has neither inputs nor features")
        first = next(iter(self.inputs.values()))
        for name, value in self.inputs.items():
            if value.shape != first.shape:
                raise DataError(
                    f"batch: {name} has shape {tuple(value.shape)}, expected that of the others, "
                    f"{tuple(first.shape)}: a number for each token"
                )
        return {k: self.shared(value, particles).flatten(0, 1) for k, value in self.inputs.items()}

    def shared(self, value: Tensor, particles: int) -> Tensor:
        """(B, ..., D) as (S, rows, D) for S draws: all rows for each, or its share of them."""
        rows = value.flatten(0, -2)
        if self.particles == 1:
            return rows.expand(particles, *rows.shape)
        return rows.unflatten(0, (particles, -1))

    def split(self, particles: int) -> Batch:
        """Share the examples out over `particles` weight draws; labels and extra columns become
        (S, B/S)."""
        count = len(self)
        if particles < 1 or count % particles:
            raise ConfigError(
                f"particles={particles} must divide the batch of {count} examples: "
                "each weight draw gets an equal share of the batch"
            )
        labels = self.labels
        if labels is not None:  # which may be shared out already
            width = labels.numel() // count
            labels = labels.reshape(particles, -1, *((width,) if width > 1 else ()))
        shape = (-1,) if particles == 1 else (particles, -1)  # outputs of one draw may be (B, .)
        extra = {name: values.reshape(shape) for name, values in self.extra.items()}
        return replace(self, labels=labels, extra=extra, particles=particles)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, Mapping):
                moved[name] = {key: tensor.to(device) for key, tensor in value.items()}
        return replace(self, **moved)


def random_order(count: int, seed: int = 0) -> Tensor:
    """The numbers 0 to `count` - 1 in a random order, which is the same for the same seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


_MAX_POOL = 50  # batches per pool; a wider pool saves hardly any more padding


def within(
    order: Tensor, sizes: Tensor, batch_size: int, most: int | None = None
) -> tuple[Tensor, ...]:
    """Examples in this order, in batches of at most `batch_size`, which take at most `most` tokens
    when all are padded to the longest; a batch of one may take more.

    Args:
        order: (M,) numbers of examples.
        sizes: (N,) tokens of each example, by its number.

    >>> [part.tolist() for part in within(torch.arange(6), torch.tensor([9, 4, 3, 2, 2, 2]), 3, 8)]
    [[0], [1, 2], [3, 4, 5]]
    """
    if most is None:
        return order.split(batch_size)
    counts, longest = [0], 0
    for size in sizes[order].tolist():
        longest = max(longest, size)
        if counts[-1] == batch_size or (counts[-1] and (counts[-1] + 1) * longest > most):
            counts.append(0)
            longest = size
        counts[-1] += 1
    return order.split(counts)


def shuffled(
    keys: Tensor, batch_size: int, multiple_of: int, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """One epoch of random batches, with examples of similar length together.

    All batches of an epoch have the same size B: a multiple of `multiple_of`, at most `batch_size`
    and as near as possible to equal shares of the N examples. Examples drawn at random appear a
    second time to fill steps * B places. They are chosen before examples are grouped by length, and
    the order of the batches is random, so each step is unbiased (`Examples.batches`). A smaller
    last batch would be so only if long texts were as likely in it as short ones.

    Args:
        keys: (N,) int64 what to group by, such as lengths.
    """
    if batch_size < multiple_of:
        raise DataError(
            f"batch_size={batch_size} is below multiple_of={multiple_of}: each weight draw needs "
            "at least one example"
        )
    count = len(keys)
    steps = -(-count // (batch_size - batch_size % multiple_of))
    width = multiple_of * -(-count // (steps * multiple_of))
    total = steps * width
    order = torch.randperm(count, generator=generator)
    # The repeated examples are those of the first batch, so no batch holds one twice
    # (unless the data set is smaller than a batch).
    order = order.repeat(-(-total // count))[:total]

    # Sort by length within pools of several batches. There are at least four pools, as otherwise
    # batches would consist of the same examples epoch after epoch.
    pool = width * min(_MAX_POOL, max(1, steps // 4))
    pools = torch.arange(total) // pool
    by_length = (pools * (int(keys.max()) + 1) + keys[order]).argsort(stable=True)
    batches = order[by_length].reshape(steps, width)

    batches = batches[torch.randperm(steps, generator=generator)]
    # Within a batch the order is random again: its parts go to different weight draws.
    within = torch.rand(steps, width, generator=generator).argsort(dim=1, stable=True)
    return batches.gather(1, within).unbind(0)
