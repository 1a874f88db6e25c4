"""What earlier rounds have learnt, as far as a later one needs it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..data import Examples


class Earlier(NamedTuple):
    """What earlier rounds have learnt.

    Attributes:
        rows: how many rows, as far as they are kept.
        separation: the AUROC with which the round's texts can be told from theirs, from 0.5 to 1;
            None if it is not known.
        output_scale: of the round, if no held-out rows choose it.
        learnt: (C,) bool, which classes they have learnt; None if it is all.
        texts: of their rows, some that were kept; None if none were.
    """

    rows: float
    separation: float | None = None
    output_scale: float = 1.0
    learnt: Tensor | None = None
    texts: Examples | None = None

    def share(self, size: int) -> float:
        """Of the rows of all rounds, those of a round of so many rows."""
        return size / (size + self.rows)

    def step(self, size: int) -> float:
        """The share of its step that a round of so many rows keeps: half of it, more with more
        rows than before, and all of it if its texts are of the kind of the earlier ones."""
        unlike = 1.0 if self.separation is None else 2 * self.separation - 1
        return size / (size + unlike * min(self.rows, size))
