"""A mini-batch: what `Model` is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import ConfigError

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples, tokenised, standing for a data set of `size` examples.

    Attributes:
        inputs: tensors for the transformer (`input_ids`, `attention_mask`, ...), each (B, T), or
            (B, C, T) for multiple choice with C choices an example. May be empty if `features`
            are given.
        labels: (B,) class or choice indices (int64) or ratings (float); None when predicting.
        size: N, the number of examples in the data set this mini-batch is drawn from; the
            likelihood is scaled by N / B. None means that the batch is the data set.
        choices: (B, C) bool, True where a choice exists (multiple choice only).
        features: (B, D) or (B, C, D) pooled features of the frozen transformer; where present
            they replace `inputs`, and PEFT weights have no effect.
        particles: the number of weight draws the batch is shared out over. With 1 every draw
            sees all B examples; with S the s-th draw sees the s-th B/S examples.

    >>> batch = Batch({"input_ids": torch.ones(4, 3, dtype=torch.long)}, torch.zeros(4), size=100)
    >>> len(batch), batch.split(2).labels.shape
    (4, torch.Size([2, 2]))
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    size: int | None = None
    choices: Tensor | None = None
    features: Tensor | None = None
    particles: int = 1

    def __len__(self) -> int:
        """B, the number of examples whatever the sharing-out."""
        if self.features is not None:
            return self.features.shape[0]
        return next(iter(self.inputs.values())).shape[0]

    def split(self, particles: int) -> Batch:
        """Share the examples out over `particles` weight draws; labels become (S, B/S)."""
        count = len(self)
        if particles < 1 or count % particles:
            raise ConfigError(
                f"particles={particles} must divide the batch of {count} examples: "
                "each weight draw gets an equal share of the batch"
            )
        return replace(
            self,
            labels=None if self.labels is None else self.labels.reshape(particles, -1),
            particles=particles,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            labels=None if self.labels is None else self.labels.to(device),
            choices=None if self.choices is None else self.choices.to(device),
            features=None if self.features is None else self.features.to(device),
        )
