"""The outcome of simulation-based calibration: ranks, a test of them, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import ConfigError
from .uniformity import band, symmetric, uniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Calibration"]

_CLEAR = 3.0  # sds of a mean rank, or of its spread, that give a name to what is wrong


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where the truth ranks among posterior draws, over R simulated data sets; made by `sbc`.

    Attributes:
        names: of the Q quantities.
        ranks: (R, Q) how many of the L draws lie below the truth: uniform in 0..L if the draws
            are of the posterior.
        draws: L.
        false_alarm: the probability that exact posteriors fail, over all quantities together.

    >>> import torch
    >>> narrow = Calibration(("slope",), torch.tensor([[0], [99]] * 50), draws=99)
    >>> print(narrow)
    failed: 1 of 1 quantities over 100 data sets (exact posteriors fail with probability 0.01)
      slope  p 0.0000  too narrow  (bias: p 1.0000)
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    false_alarm: float = 0.01

    def __post_init__(self) -> None:
        if self.ranks.dim() != 2 or self.ranks.shape[1] != len(self.names):
            raise ConfigError(
                f"ranks have shape {tuple(self.ranks.shape)}, expected (R, {len(self.names)})"
            )
        if not 0 < self.false_alarm < 1:
            raise ConfigError(f"false_alarm={self.false_alarm} must lie between 0 and 1")

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Per quantity, of its ranks being uniform (`uniformity.uniform`)."""
        columns = self.ranks.T.numpy()
        return {
            name: uniform(column, self.draws)
            for name, column in zip(self.names, columns, strict=True)
        }

    @cached_property
    def bias(self) -> dict[str, float]:
        """Per quantity, the p-value of ranks symmetric about their middle (Yao et al. 2018)."""
        columns = self.ranks.T.numpy()
        return {
            name: symmetric(column, self.draws)
            for name, column in zip(self.names, columns, strict=True)
        }

    @property
    def failed(self) -> list[str]:
        """Quantities whose ranks are not uniform, at `false_alarm` / Q each (Bonferroni)."""
        return [name for name, p in self.p_values.items() if p < self._each]

    @property
    def biased(self) -> list[str]:
        """Quantities whose ranks are not symmetric, at `false_alarm` / Q each."""
        return [name for name, p in self.bias.items() if p < self._each]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failed

    @property
    def _each(self) -> float:
        return self.false_alarm / len(self.names)

    def shape(self, name: str) -> str:
        """How the posterior of a quantity misses the truth: "too low", "too narrow", or ""."""
        rank = self.ranks[:, self.names.index(name)].double()
        place = ((rank + 0.5) / (self.draws + 1)).numpy() - 0.5  # uniform: mean 0, square 1/12
        root = len(place) ** 0.5
        shift = place.mean() * root * 12**0.5
        spread = (np.square(place).mean() - 1 / 12) * root * 180**0.5
        words = []
        if abs(shift) > _CLEAR:
            words.append("too low" if shift > 0 else "too high")
        if abs(spread) > _CLEAR and abs(spread) > abs(shift):
            words.append("too narrow" if spread > 0 else "too wide")
        return ", ".join(words)

    def __str__(self) -> str:
        share = f"failed: {len(self.failed)} of" if self.failed else "passed:"
        lines = [
            f"{share} {len(self.names)} quantities over {len(self.ranks)} data sets (exact "
            f"posteriors fail with probability {self.false_alarm:g})"
        ]
        width = max(map(len, self.names))
        for name, p in self.p_values.items():
            words = self.shape(name)
            lines.append(
                f"  {name:<{width}}  p {p:.4f}  {words + '  ' if words else ''}"
                f"(bias: p {self.bias[name]:.4f})"
            )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ranks' ECDFs less the uniform one, and the band that holds one of them, if exact,
        with probability 1 - `false_alarm` / Q."""
        from ..plots import rank_ecdf  # Matplotlib is slow to import

        lower, upper = band(len(self.ranks), self.draws, 1 - self._each)
        ecdfs = {}
        for name, column in zip(self.names, self.ranks.T.numpy(), strict=True):
            counts = np.bincount(column, minlength=self.draws + 1).cumsum()[:-1]
            ecdfs[name] = counts / len(self.ranks)
        return rank_ecdf(ecdfs, lower, upper, ax)
