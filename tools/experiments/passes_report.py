"""The table of what fewer passes lose, from the files in `docs/results/passes`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.prediction.predict import AnyForecast

from .grid import PASSES, stored_runs
from .scores import passes
from .tables import DIFFERENCES, OVER_SEEDS, Table, difference, distinct

__all__ = ["tables"]

_TUNED, _ENSEMBLE = "hybrid, deterministic + scaling", "hybrid, ensemble + scaling"
_ONE, _EXACT = "hybrid, one component", "hybrid, Bayesian"
_SHOWN = {
    _TUNED: "fine-tuning + scaling",
    _ENSEMBLE: "ensemble of five + scaling",
    _ONE: "one component",
    _EXACT: "five components, exact",
}


def tables(folder: Path, tasks: dict[str, str], rows: int = 400) -> Iterator[Table]:
    """For each task, by its name to show, what each method reaches and costs, and how much higher
    its NLL is than that of the exact forecast."""
    for shown, task in tasks.items():
        runs = {name: stored_runs(folder / "passes", task, name, rows) for name in PASSES}
        exact = runs[_EXACT]
        if not exact:
            continue
        records, gaps = [], {}
        for name, outcomes in runs.items():
            called = _SHOWN.get(name, name.removeprefix("hybrid, "))
            for seed, outcome in outcomes.items():
                (score,) = passes(outcome)
                record: dict[str, Any] = {"method": called, **score.values}
                if seed in exact and name != _EXACT:
                    record |= _likeness(outcome.forecasts["test"], exact[seed].forecasts["test"])
                records.append(record)
            if name != _EXACT and outcomes:
                ours = {seed: run.forecasts["test"].nlls() for seed, run in outcomes.items()}
                theirs = {seed: run.forecasts["test"].nlls() for seed, run in exact.items()}
                gaps[called,] = difference(ours, theirs)
        facts = [outcome.facts for outcomes in runs.values() for outcome in outcomes.values()]
        note = (
            "`times one model`: processor time over that of a fine-tuned model's prediction, in "
            f"turn. {distinct(facts, 'steps')} steps; commits {distinct(facts, 'commit')}. "
            f"{OVER_SEEDS}"
        )
        title = f"Fewer passes on {shown}"
        yield Table.over_seeds(title, ["method"], records, note)
        yield Table.of_numbers(
            f"{title}: NLL minus that of the exact forecast", ["method"], gaps, DIFFERENCES
        )


def _likeness(one: AnyForecast, other: AnyForecast) -> dict[str, float]:
    """How like the exact forecast of the same rows, the `other`, one is."""
    values: dict[str, float] = {}
    if not isinstance(one, RatingForecast) and not isinstance(other, RatingForecast):
        values["same decision"] = (one.label == other.label).double().mean().item()
    if one.epistemic.std() > 0:
        correlation = spearmanr(one.epistemic, other.epistemic).statistic
        values["epistemic, rank correlation"] = float(correlation)
    return values
