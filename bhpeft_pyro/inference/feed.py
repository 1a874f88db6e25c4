"""Batches for a model, with the frozen part computed once where that is possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..axes import check_features
from ..batch import Batch
from ..data import Examples
from ..data.epochs import in_order, shuffled
from ..head import Head
from ..model import Model

__all__ = ["Feed"]


class Feed:
    """Training and prediction batches of a data set.

    Without PEFT weights the transformer's features never change: they are computed once, and a
    head-only fit costs no more than the head. If `frozen`, the same is done with PEFT weights,
    which then have no effect: they are held at `weights`, one tensor a site, or left out.
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
        self.choices: Tensor | None = None
        network = model.network
        if (frozen or not network.kinds) and isinstance(network.head, Head):
            self._compute(model, batch_size, weights)

    def whole(self) -> Batch:
        """All examples as one batch, where features are computed."""
        return self._batch(torch.arange(len(self.examples)))

    def training(
        self, batch_size: int, particles: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """One epoch of shuffled batches, each split over the particles."""
        if self.features is None:
            yield from (
                batch.split(particles)
                for batch in self.examples.batches(
                    batch_size, shuffle=True, generator=generator, multiple_of=particles
                )
            )
            return
        alike = torch.zeros(len(self.examples), dtype=torch.long)
        for indices in shuffled(alike, batch_size, particles, False, generator):
            yield self._batch(indices).split(particles)

    def prediction(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Every example once, with its indices."""
        if self.features is None:
            yield from self.examples.by_length(batch_size)
            return
        for indices in in_order(len(self.examples), batch_size, 1, False):
            yield indices, self._batch(indices)

    def _batch(self, indices: Tensor) -> Batch:
        assert self.features is not None
        labels = self.examples.labels
        return Batch(
            {},
            None if labels is None else labels[indices],
            size=len(self.examples),
            choices=None if self.choices is None else self.choices[indices],
            features=self.features[indices],
        )

    def _compute(self, model: Model, batch_size: int, weights: Mapping[str, Tensor] | None) -> None:
        parts = []
        held = () if weights is None else (weights,)
        for indices, batch in self.examples.by_length(batch_size):
            features = model.network.features(batch.to(model.network.device), *held).cpu()
            parts.append((indices, check_features(features)))
        shape = list(parts[0][1].shape)
        shape[0] = len(self.examples)
        counts = self.examples.counts
        if counts is not None:
            shape[1] = int(counts.max())
            self.choices = torch.arange(shape[1]) < counts.unsqueeze(-1)
        self.features = torch.zeros(shape)
        for indices, features in parts:
            if counts is None:
                self.features[indices] = features
            else:
                self.features[indices, : features.shape[1]] = features
