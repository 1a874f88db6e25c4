"""Forecasts: what a posterior says about new examples, and how sure it is.

Draws of the weights give one predictive distribution each; a forecast holds their mixture and
splits its uncertainty into two parts (Depeweg et al. 2018):

* *aleatoric*, what every single draw is unsure about: more data of this kind will not help;
* *epistemic*, what the draws disagree about: labels for such examples will help.

Forecasts live on the CPU and are detached; sums are taken in float64, results have the precision
of the draws (at least float32). In this package S counts draws, N examples and C classes.
"""

from . import metrics
from .base import Forecast
from .classes import ClassForecast
from .multilabel import LabelsForecast
from .ratings import RatingForecast

__all__ = ["ClassForecast", "Forecast", "LabelsForecast", "RatingForecast", "metrics"]
