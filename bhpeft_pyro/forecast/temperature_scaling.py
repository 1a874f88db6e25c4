"""Temperature scaling (Guo et al. 2017, section 4.2): one number that mends over-confidence.

A deterministic network with a temperature is the rival every Bayesian one has to beat. The
temperature is fitted to validation data the network was not trained on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, LikelihoodError
from . import ClassForecast

__all__ = [
    "fit_temperature",
    "scale",
    "tempered",
]


_LIMIT = 100.0
_BISECTIONS = 60  # down to rounding in float64


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """The T > 0 with the least NLL of softmax(log_probabilities / T), by bisection.

    T above 1 makes forecasts less confident, below 1 more. Kept within [1/100, 100]: where all
    validation examples are right, or confidence is of no use at all, the optimum is at infinity.

    Args:
        log_probabilities: (N, C) logits or log-probabilities; -inf where there is no such choice.
        labels: (N,) class indices.

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 1, 1])), 2)  # right 3 times of 4
    3.64
    """
    if log_probabilities.ndim != 2 or log_probabilities.numel() == 0:
        raise LikelihoodError(
            f"log_probabilities must be (N, C), got shape {tuple(log_probabilities.shape)}"
        )
    count, classes = log_probabilities.shape
    if labels.shape != (count,) or labels.is_floating_point():
        raise DataError(
            f"labels must be {count} whole numbers, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not ((labels >= 0) & (labels < classes)).all():
        raise DataError(f"labels must lie in 0..{classes - 1}")
    logits = log_probabilities.detach().double()
    labels = labels.to(logits.device).long()
    absent = logits == -torch.inf
    if not logits[~absent].isfinite().all() or absent.gather(1, labels[:, None]).any():
        raise LikelihoodError(
            "log_probabilities must be finite at the labels, and never NaN or inf"
        )
    logits = logits.masked_fill(absent, 0.0)  # -inf / T would have a NaN gradient

    truth = logits.gather(1, labels[:, None])[:, 0]

    def too_hot(temperature: float) -> bool:
        """Whether the NLL, which is convex in 1/T, falls as T does."""
        p = (logits / temperature).masked_fill(absent, -torch.inf).softmax(-1)
        return bool(((p * logits).sum(-1) - truth).sum() < 0)

    low, high = 1 / _LIMIT, _LIMIT
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if too_hot(middle) else (middle, high)
    return math.sqrt(low * high)


def scale(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., C) at `temperature`: log softmax(log_probabilities / T).

    >>> scale(torch.tensor([0.9, 0.1]).log(), 2.0).exp()
    tensor([0.7500, 0.2500])
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be positive and finite")
    return (log_probabilities / temperature).log_softmax(-1)


def tempered(forecast: ClassForecast, validation: ClassForecast) -> tuple[ClassForecast, float]:
    """A forecast at the temperature that suits a labelled validation forecast, and that number.

    It is of the draws' mean, so that all of its uncertainty is aleatoric.

    >>> sure = ClassForecast.from_draws(torch.tensor([[[0.98, 0.02]] * 4]), labels=[0, 0, 0, 1])
    >>> round(tempered(sure, sure)[0].confidence[0].item(), 2)  # right 3 times of 4
    0.75
    """
    temperature = fit_temperature(validation.log_probabilities, validation.observed())
    scaled = scale(forecast.log_probabilities, temperature).exp()
    return (
        ClassForecast.from_draws(
            scaled.to(forecast.probabilities.dtype)[None],
            labels=forecast.labels,
            texts=forecast.texts,
            label_names=forecast.label_names,
            choices=forecast.choices,
        ),
        temperature,
    )
