"""Every row has the label of another: whoever is right has seen the test's labels."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast import ClassForecast

from .outcome import Outcome
from .scores import Score
from .tables import Table

__all__ = ["canary", "check"]

_ALARM = 0.001  # the chance of any false alarm in a table


def canary(outcome: Outcome) -> list[Score]:
    """How often the forecasts are right, and how often the most frequent class is."""
    forecast = outcome.forecasts["test"]
    assert isinstance(forecast, ClassForecast)
    labels = forecast.observed()
    values = {
        "accuracy": (forecast.label == labels).double().mean().item(),
        "chance": float(labels.bincount().max()) / len(labels),
        "examples": float(len(labels)),
    }
    return [Score(outcome.facts["task"], values)]


def check(tables: Sequence[Table]) -> None:
    """Alarm where a method is right more often than by chance, by a binomial test.

    Raises:
        DataError: with the methods that are.
    """
    for table in tables:
        found = []
        for row in table.rows:
            count = round(row.cells["examples"].value) * int(row.head[-1])
            right = round(row.cells["accuracy"].value * count)
            chance = row.cells["chance"].value
            p = stats.binomtest(right, count, chance, alternative="greater").pvalue
            if p * len(table.rows) < _ALARM:
                found.append(f"{row.head[0]} ({right} of {count} right, p = {p:.1g})")
        if found:
            raise DataError(
                f"canary: {'; '.join(found)}: labels have nothing to do with their texts here, so "
                "the test's labels were seen"
            )
