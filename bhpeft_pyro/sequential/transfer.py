"""Metrics of what is kept, and carried over, from round to round.

All take a matrix R (T, T): R[i, j] is the accuracy (or another score, larger is better) on the
test data of round j after round i has been learnt. With T rounds, counted from 1:
"""

from __future__ import annotations

from torch import Tensor

from ..errors import DataError

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer"]


def average_accuracy(scores: Tensor) -> float:
    """1/T sum_j R[T, j] (Lopez-Paz and Ranzato 2017): over all rounds, at the end.

    >>> import torch
    >>> average_accuracy(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    0.75
    """
    return _checked(scores)[-1].mean().item()


def backward_transfer(scores: Tensor) -> float:
    """1/(T-1) sum_{j<T} R[T, j] - R[j, j] (Lopez-Paz and Ranzato 2017).

    What later rounds have done to earlier ones: below zero, they were forgotten.

    >>> import torch
    >>> round(backward_transfer(torch.tensor([[0.9, 0.5], [0.7, 0.8]])), 6)
    -0.2
    """
    scores = _checked(scores, 2)
    return (scores[-1] - scores.diagonal())[:-1].mean().item()


def forward_transfer(scores: Tensor, untrained: Tensor) -> float:
    """1/(T-1) sum_{j>1} R[j-1, j] - b[j] (Lopez-Paz and Ranzato 2017).

    What earlier rounds have done for a round before it was learnt.

    Args:
        scores: R.
        untrained: (T,) b, the scores before any round was learnt.

    >>> import torch
    >>> round(forward_transfer(torch.tensor([[0.9, 0.6], [0.7, 0.8]]), torch.tensor([0.5, 0.5])), 6)
    0.1
    """
    scores = _checked(scores, 2)
    if untrained.shape != scores.shape[:1]:
        raise DataError(
            f"untrained has shape {tuple(untrained.shape)}, expected {tuple(scores.shape[:1])}"
        )
    return (scores.diagonal(1) - untrained.double()[1:]).mean().item()


def forgetting(scores: Tensor) -> float:
    """1/(T-1) sum_{j<T} max_{i<T} R[i, j] - R[T, j] (Chaudhry et al. 2018).

    How far each earlier round is, at the end, below the best it ever was.

    >>> import torch
    >>> round(forgetting(torch.tensor([[0.9, 0.5], [0.7, 0.8]])), 6)
    0.2
    """
    scores = _checked(scores, 2)
    return (scores[:-1].amax(0) - scores[-1])[:-1].mean().item()


def _checked(scores: Tensor, rounds: int = 1) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or scores.isnan().any():
        raise DataError(f"scores must be a (T, T) matrix without gaps, got {tuple(scores.shape)}")
    if len(scores) < rounds:
        raise DataError(f"scores of {len(scores)} round; expected {rounds} or more")
    return scores.double()
