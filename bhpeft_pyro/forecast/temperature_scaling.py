"""Temperature scaling (Guo et al. 2017, section 4.2): one number that mends over-confidence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .classes import ClassForecast

__all__ = ["tempered"]

_LIMIT = 100.0
_BISECTIONS = 60  # down to rounding in float64


def tempered(forecast: ClassForecast, validation: ClassForecast) -> tuple[ClassForecast, float]:
    """A forecast at the temperature that suits a labelled validation forecast, and that number.

    The temperature T minimises the NLL of softmax(log p / T), p the mean of the draws; so all of
    the new forecast's uncertainty is aleatoric. T above 1 makes forecasts less confident, below 1
    more. It is kept within [1/100, 100]: if all validation examples are right, or confidence is
    useless, the optimum is at 0 or infinity.

    Args:
        forecast: of any examples.
        validation: of labelled examples that the network was not trained on.

    >>> sure = ClassForecast.from_draws(torch.tensor([[[0.98, 0.02]] * 4]), labels=[0, 0, 0, 1])
    >>> round(tempered(sure, sure)[0].confidence[0].item(), 2)  # 3 of 4 are right
    0.75
    """
    temperature = _best_temperature(validation.log_probabilities, validation.observed())
    scaled = (forecast.log_probabilities / temperature).softmax(-1)
    mended = ClassForecast.from_draws(
        scaled.to(forecast.probabilities.dtype)[None],
        labels=forecast.labels,
        texts=forecast.texts,
        label_names=forecast.label_names,
        choices=forecast.choices,
    )
    return mended, temperature


def _best_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    absent = log_probabilities == -torch.inf  # choices that do not exist
    logits = log_probabilities.masked_fill(absent, 0.0)  # 0 * -inf would be NaN
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
