"""How large a guide will be, before any of it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..distributions import CHUNK
from ..errors import GuideError

__all__ = ["Budget", "budget"]

_TRAINED = 16  # bytes a parameter: float32 value, gradient and the two moments of Adam
_KEPT = 4
GATHERED = 256
"""Gradients gathered before a Laplace approximation's leading directions are computed again."""
_EXAMPLES = 16  # of a batch, unless `fit` is told otherwise; each has weights of its own
_COPIES = 14  # of these, on their way from draw to gradient
_SCALABLE = "'normal', 'laplace', 'delta' and AutoNormal grow in proportion to the latents"


@dataclass(frozen=True)
class Budget:
    """What a guide takes while it is fitted.

    Attributes:
        latents: D, the numbers that are random.
        parameters: those that are trained.
        bytes: memory of parameters, gradients, optimiser state and what else the guide keeps, or
            holds while it is measured on batches of 16; the transformer's own is not in it.

    >>> print(budget("AutoMultivariateNormal", 100_000))
    100,000 latents, 10,000,200,000 parameters, 149.0 GiB
    """

    latents: int
    parameters: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.latents:,} latents, {self.parameters:,} parameters, "
            f"{self.bytes / 2**30:.1f} GiB"
        )

    def __add__(self, other: Budget) -> Budget:
        return Budget(
            self.latents + other.latents,
            self.parameters + other.parameters,
            self.bytes + other.bytes,
        )

    def check(self, name: str, limit: int) -> None:
        """Refuse a guide that is too large.

        Raises:
            GuideError: with the figures and what would fit.
        """
        if self.bytes > limit:
            raise GuideError(
                f"autoguide: {name!r} would take {self}, more than max_bytes="
                f"{limit / 2**30:.1f} GiB; {_SCALABLE}, or restrict it to fewer weights "
                "(presets.head_only(), a lower rank, fewer layers)"
            )


def budget(
    name: str, latents: int, shapes: Sequence[tuple[int, ...]] = (), **options: Any
) -> Budget | None:
    """The size of a guide by name, with the options of its constructor; None if it is not known.

    Args:
        name: as `autoguide` takes it.
        latents: D.
        shapes: of the latents, on which some sizes depend; by default there is but one.
        options: of the guide.

    >>> budget("normal", 1000)
    Budget(latents=1000, parameters=2000, bytes=32000)
    """
    d = latents
    rank = options.get("rank")
    kept = 0
    match name:
        case "delta" | "AutoDelta":
            parameters = d
        case "normal" | "AutoNormal" | "AutoDiagonalNormal":
            parameters = 2 * d
        case "laplace":
            parameters = d
            axes = rank or 16
            kept = d * (2 * axes + 1) + _measurement(d, axes)  # its axes, and the last good ones
        case "AutoLowRankMultivariateNormal" | "lowrank":
            parameters = d * (2 + (rank or max(1, round(d**0.5))))
        case "AutoMultivariateNormal" | "mvn":
            parameters = d * (2 + d)
        case "AutoStructured" | "structured":  # a matrix within and one between any two
            within = sum(prod(shape) ** 2 for shape in shapes or [(d,)])
            parameters = 2 * d + (d * d + within) // 2
        case "AutoLaplaceApproximation":
            parameters, kept = d, 2 * d * d  # the Hessian and its factor
        case "AutoIAFNormal" | "iaf":
            # One hidden layer of 3 D + 1 a transform, unless told otherwise.
            hidden = sum(options.get("hidden_dim") or [3 * d + 1])
            parameters = options.get("num_transforms", 1) * (3 * d * hidden + hidden + 2 * d)
        case _:
            return None
    return Budget(d, parameters, _TRAINED * parameters + _KEPT * kept)


def _measurement(d: int, axes: int) -> int:
    """Numbers held while a low-rank covariance is computed (`inference/curvature.py`)."""
    columns = max(2 * axes, axes + GATHERED) + _EXAMPLES
    products = 2 * (CHUNK + 4 * columns**2)  # in double precision
    return d * (columns + axes + _COPIES * _EXAMPLES) + products
