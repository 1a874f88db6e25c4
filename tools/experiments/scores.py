"""From a run's outcome to the numbers that tables show, one function an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bhpeft_pyro.forecast import ClassForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate, rejection_curve
from bhpeft_pyro.prediction.predict import AnyForecast

from .outcome import Outcome

__all__ = ["Score", "scaled"]


@dataclass(frozen=True, eq=False)
class Score:
    """What one run says in one line of a table.

    Attributes:
        table: the table that it belongs to: a task, and what of it.
        values: by column.
        by: what tells it from other lines of the same method.
    """

    table: str
    values: Mapping[str, float]
    by: str = ""


def scaled(outcome: Outcome) -> Outcome:
    """With temperature scaling (Guo et al. 2017), fitted on the validation rows.

    Ratings have their sds, and how far draws are from their mean, multiplied by the factor that
    gives the validation rows' standardised errors a mean square of 1.
    """
    validation = outcome.forecasts["validation"]
    made = {name: _scaled(forecast, validation) for name, forecast in outcome.forecasts.items()}
    return replace(outcome, forecasts=made)


def _scaled(forecast: AnyForecast, validation: AnyForecast) -> AnyForecast:
    if isinstance(forecast, ClassForecast):
        assert isinstance(validation, ClassForecast)
        return forecast.tempered(validation)[0]
    assert isinstance(forecast, RatingForecast)
    assert isinstance(validation, RatingForecast)
    error = (validation.observed() - validation.mean) / validation.sd
    # Moved and kept in double precision, the draws keep their mean.
    factor, means = error.square().mean().sqrt(), forecast.means.double()
    mean = means.mean(0)
    within = forecast.within
    return replace(
        forecast,
        means=mean + factor * (means - mean),
        sds=factor * forecast.sds,
        within=None if within is None else factor.square() * within,
    )


def quality(outcome: Outcome) -> list[Score]:
    """All metrics on the test rows."""
    forecast = outcome.forecasts["test"]
    values = evaluate(forecast)
    values.pop("mutual_information", None)
    return [Score(outcome.facts["task"], values)]


def passes(outcome: Outcome) -> list[Score]:
    """What matters of the test rows, beside what a prediction costs."""
    forecast, facts = outcome.forecasts["test"], outcome.facts
    values = evaluate(forecast)
    shown = ("accuracy", "mse", "nll", "ece", "coverage_90")
    kept = {name: values[name] for name in shown if name in values}
    by = "confidence" if "accuracy" in values else "total"
    kept["most certain half"] = rejection_curve(forecast, by=by, fractions=[0.5])[1].item()
    costs = {name: facts[name] for name in ("passes", "times one model") if name in facts}
    return [Score(facts["task"], kept | costs)]
