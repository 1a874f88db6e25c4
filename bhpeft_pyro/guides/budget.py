"""The size of a guide, known before any of it is made."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import GuideError

_AT_ONCE = 2**31  # bytes of Jacobians, and of gathered gradients
_GATHERED, _EXAMPLES = 256, 16
_REUSED, _MOST = 256, 2**30  # Jacobian rows that are kept for another use, in so many bytes
_TRAINED = 16  # bytes a parameter: float32 value, gradient and the two moments of Adam
_KEPT = 4  # bytes of any other number


@dataclass(frozen=True)
class Budget:
    """What a guide needs while it is fitted.

    Attributes:
        latents: D, the number of random weights.
        parameters: the number of trained parameters.
        bytes: memory of the parameters, their gradients and optimiser state, and of what else the
            guide keeps or needs to compute its covariance (for batches of 16). The transformer's
            own memory is not included.

    >>> print(Budget.of(100_000, 10_000_200_000))
    100,000 latents, 10,000,200,000 parameters, 149.0 GiB
    """

    latents: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, latents: int, parameters: int, kept: int = 0) -> Budget:
        """From counts: latents, trained parameters, and other numbers that are kept."""
        return cls(latents, parameters, _TRAINED * parameters + _KEPT * kept)

    def __str__(self) -> str:
        return (
            f"{self.latents:,} latents, {self.parameters:,} parameters, "
            f"{self.bytes / 2**30:.1f} GiB"
        )

    def check(self, limit: int) -> None:
        """Refuse a guide that needs more than `limit` bytes.

        Raises:
            GuideError: it does; the message has the figures and what would fit.
        """
        if self.bytes > limit:
            raise GuideError(
                f"it would take {self}, more than max_bytes={limit / 2**30:.1f} GiB; expected "
                "fewer weights (a lower rank, LoRA on the upper layers alone, "
                "presets.head_only()), a guide that takes less ('laplace' with a lower rank, "
                "'normal', or 'delta', which takes least), or a larger max_bytes"
            )


def gradients_at_once(latents: int, rank: int) -> int:
    """How many gradients are gathered before a Laplace approximation's leading directions are
    computed again: as many as 2 GiB hold, at least `rank` and at most 256."""
    return max(rank, min(_GATHERED, _AT_ONCE // (_KEPT * max(latents, 1))))


def rows_kept(latents: int) -> int:
    """How many rows of Jacobians are kept for another use: 256 if 1 GiB holds them, or else none,
    and they are computed again."""
    return _REUSED if _KEPT * latents * _REUSED <= _MOST else 0


def examples_at_once(latents: int, outputs: int = 3, most: int = _EXAMPLES) -> int:
    """How many examples have their Jacobians in memory together: as many as 2 GiB hold.

    Each takes a copy of the weights, of their gradients and of three of its Jacobian.
    """
    each = _KEPT * latents * (5 + 3 * outputs)
    return max(1, min(most, _AT_ONCE // max(each, 1)))
