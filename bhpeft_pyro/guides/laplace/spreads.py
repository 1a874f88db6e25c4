"""What held-out rows teach about the covariance of outputs, so that predictions need no backward
passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.amortized import OutputCovariance, parts_of
from ...model.linearized import LinearOutputs


@dataclass(frozen=True)
class Spreads:
    """The covariances of the outputs of N rows at each of T taus, in parts (`amortized.parts_of`).

    Attributes:
        features: (N, D) of the rows, pooled.
        parts: for each tau, factors (N,) and a shape (E, E).
        inside: how many of the E are outputs of the network.
    """

    features: Tensor
    parts: Sequence[tuple[Tensor, Tensor]]
    inside: int

    @classmethod
    def of(
        cls, rows: Sequence[LinearOutputs], spreads: Sequence[Sequence[Tensor]]
    ) -> Spreads:
        """From batches of rows, and for each tau the (B, E, E) covariances of each batch."""
        inside = int((~rows[0].of_likelihood).sum())
        parts = []
        for batches in spreads:
            if rows[0].choices is None:
                parts.append(parts_of(torch.cat([*batches]), inside, None))
                continue
            # Batches may have different numbers of choices.
            each = [
                parts_of(batch, inside, outputs.choices)
                for batch, outputs in zip(batches, rows, strict=True)
            ]
            factors, shapes = zip(*each, strict=True)
            parts.append((torch.cat(factors), shapes[0]))
        return cls(torch.cat([outputs.features for outputs in rows]), parts, inside)

    def learnt(self, tau: int, scale: float = 1.0) -> OutputCovariance:
        """What is learnt of the covariances at a tau, for outputs `scale` times as large."""
        factors, shape = self.parts[tau]
        return OutputCovariance.fitted(self.features, scale**2 * factors, shape, self.inside)
