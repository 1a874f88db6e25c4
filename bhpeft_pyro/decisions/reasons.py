"""Why to doubt a forecast: noise in the label, what is not known of the weights, or a text unlike
all that was learnt.

The first two add up to the uncertainty of a forecast. The third is of another kind: far from what
was learnt a forecast may look sure, and need not be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..base.checks import Number
from ..errors import DataError

if TYPE_CHECKING:
    from ..forecast.base import Forecast

__all__ = ["NO_NOVELTY", "reasons_of", "unlike_learnt"]

NO_NOVELTY = (
    "this posterior does not know what it has learnt: it is of an earlier version or was made "
    "without data, or there were fewer than 19 texts"
)

_REASONS = ("noise in the label", "components disagree", "weights uncertain")
_UNLIKE = "unlike what was learnt"


def unlike_learnt(forecast: Forecast, max_false_alarms: float) -> Tensor:
    """(N,) bool, which texts are unlike what was learnt.

    Args:
        forecast: with p-values, `novelty`.
        max_false_alarms: at most this share of texts like the learnt ones is flagged, on average.

    Raises:
        ConfigError: the share is not above 0 and at most 1.
        DataError: the posterior does not know what it has learnt.

    >>> from dataclasses import replace
    >>> from bhpeft_pyro.forecast import ClassForecast
    >>> forecast = ClassForecast.from_draws(torch.full((1, 4, 2), 0.5))
    >>> forecast = replace(forecast, novelty=torch.tensor([0.01, 0.04, 0.3, 0.9]))
    >>> unlike_learnt(forecast, 0.05).tolist()
    [True, True, False, False]
    """
    share = Number(above=0, most=1)("max_false_alarms", max_false_alarms)
    if (p := forecast.novelty) is None:
        how = "posterior.replace(novelty=Novelty.of(model, examples)) tells it"
        raise DataError(f"novelty: {NO_NOVELTY}; {how}")
    return p <= share


def reasons_of(forecast: Forecast) -> list[str]:
    """For each of N texts the main reason to doubt its forecast.

    A text with a p-value of at most 5 % is "unlike what was learnt". Otherwise the reason is the
    largest part of its uncertainty: "noise in the label" is aleatoric, "components disagree" is
    what is epistemic between the components of a mixture, and "weights uncertain" is the rest of
    that, within them.
    """
    noise, epistemic = forecast.uncertainty("aleatoric"), forecast.uncertainty("epistemic")
    between = getattr(forecast, "between", None)
    between = torch.zeros_like(epistemic) if between is None else between
    main = torch.stack([noise, between, epistemic - between]).argmax(0)
    reasons = [_REASONS[number] for number in main.tolist()]
    if forecast.novelty is None:
        return reasons
    unlike = unlike_learnt(forecast, 0.05).tolist()
    return [_UNLIKE if novel else why for novel, why in zip(unlike, reasons, strict=True)]
