"""The table of what fewer passes lose, from the files in `docs/results/passes`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.forecast.metrics import mean_and_error
from bhpeft_pyro.prediction.predict import AnyForecast

from .catalogue import EXPERIMENTS
from .differences import DIFFERENCES, difference
from .methods import method
from .outcome import Outcome
from .report import stored_runs
from .scores import passes
from .tables import OVER_SEEDS, Number, Table, distinct

__all__ = ["lengths", "likeness", "tables"]

_TUNED, _ENSEMBLE = "hybrid, deterministic + scaling", "hybrid, ensemble + scaling"
_EXACT = "hybrid, Bayesian"
_SHOWN = {
    _TUNED: "fine-tuning + scaling",
    _ENSEMBLE: "ensemble of five + scaling",
    _EXACT: "five components, exact",
    "hybrid, learnt covariance": "five components, learnt covariances",
}

_SHORTER = {"140 steps at most": "passes", "three evaluations without a better state": "stop"}


def tables(folder: Path, tasks: dict[str, str], rows: int = 400) -> Iterator[Table]:
    """For each task, by its name to show, what each method reaches and costs, and how much higher
    its NLL is than that of the exact forecast."""
    for shown, task in tasks.items():
        names = EXPERIMENTS["passes"].methods
        runs = {name: stored_runs(folder / "passes", task, method(name), rows) for name in names}
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
                    record |= likeness(outcome.forecasts["test"], exact[seed].forecasts["test"])
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


def lengths(folder: Path, tasks: dict[str, str], rows: int = 400) -> Table:
    """Shorter fits to the same rows: how much higher their NLL is, and how many steps they take."""
    lines: dict[Any, dict[str, Number]] = {}
    for (shown, task), (what, part), name in product(
        tasks.items(), _SHORTER.items(), (_TUNED, _ENSEMBLE, _EXACT)
    ):
        short = stored_runs(folder / part, task, method(name), rows)
        long = {
            seed: outcome
            for seed, outcome in stored_runs(folder / "tasks", task, method(name), rows).items()
            if seed in short and outcome.facts["data"] == short[seed].facts["data"]
        }
        if not long:
            continue
        one, other = (
            {seed: runs[seed].forecasts["test"].nlls() for seed in long} for runs in (short, long)
        )
        steps = [_steps(short[seed]) / _steps(long[seed]) for seed in long]
        lines[shown, what, _SHOWN[name], str(len(long))] = {
            "nll before": mean_and_error([nlls.mean().item() for nlls in other.values()]),
            "nll": mean_and_error([nlls.mean().item() for nlls in one.values()]),
            "difference": difference(one, other)["nll"],
            "steps / before": mean_and_error(steps),
        }
    note = (
        "Test NLL after 400 rows in batches of 16; before: 300 steps, of which the last state is "
        "kept unless an earlier one is better by two standard errors. Standard errors over seeds, "
        "of one seed over test rows."
    )
    head = ["task", "change", "method", "seeds"]
    return Table.of_numbers("Length of a fit", head, lines, note)


def _steps(outcome: Outcome) -> int:
    return sum(component["steps"] for component in outcome.facts["components"])


def likeness(one: AnyForecast, other: AnyForecast) -> dict[str, float]:
    """How like the exact forecast of the same rows, the `other`, one is."""
    values: dict[str, float] = {}
    if not isinstance(one, RatingForecast) and not isinstance(other, RatingForecast):
        values["same decision"] = (one.label == other.label).double().mean().item()
    if one.epistemic.std() > 0:
        correlation = spearmanr(one.epistemic, other.epistemic).statistic
        values["epistemic, rank correlation"] = float(correlation)
    return values
