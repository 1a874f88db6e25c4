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

__all__ = ["cheaper", "lengths", "likeness", "tables"]

_TUNED, _ENSEMBLE = "hybrid, deterministic + scaling", "hybrid, ensemble + scaling"
_ONE, _EXACT = "hybrid, one component", "hybrid, Bayesian"
_SHOWN = {
    _TUNED: "fine-tuning + scaling",
    _ENSEMBLE: "ensemble of five + scaling",
    _ONE: "one component",
    _EXACT: "five components, exact",
}

_SHORTER = (
    (400, "140 steps at most", "tasks", "passes"),
    (400, "three evaluations without a better state", "tasks", "stop"),
    (100, "5 epochs, not 15", "epochs-15", "epochs-5"),
    (2000, "5 epochs, not 15", "epochs-15", "epochs-5"),
)
"""Changes of the length of a fit: training rows, its name, and the folders before and after."""

_CHEAPER = {
    "hybrid, branches": "five branches of one fit",
    "hybrid, ends of cycles": "the ends of five cycles of one fit",
    "upper hybrid, Bayesian": "five fits of the upper three of six layers",
}


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


def lengths(folder: Path, tasks: dict[str, str]) -> Table:
    """Shorter fits to the same rows: how much higher their NLL is, and how many steps they take."""
    lines: dict[Any, dict[str, Number]] = {}
    for (shown, task), (rows, change, *parts), name in product(
        tasks.items(), _SHORTER, (_TUNED, _ONE, _ENSEMBLE, _EXACT)
    ):
        before, after = (stored_runs(folder / part, task, method(name), rows) for part in parts)
        for seeds, values in _beside(after, before):
            lines[shown, str(rows), change, _SHOWN[name], seeds] = values
    note = (
        "Test NLL, in batches of 16. Before: 300 steps, of which the last state is kept unless an "
        "earlier one is better by two standard errors; with 100 and 2,000 rows 15 epochs at most, "
        "with the rule that stops early. Standard errors over seeds, of one seed over test rows."
    )
    head = ["task", "rows", "change", "method", "seeds"]
    return Table.of_numbers("Length of a fit", head, lines, note)


def cheaper(folder: Path, tasks: dict[str, str]) -> Table:
    """Five components in fewer training steps than five fits of all layers."""
    lines: dict[Any, dict[str, Number]] = {}
    for (shown, task), (name, called) in product(tasks.items(), _CHEAPER.items()):
        ours = stored_runs(folder / "shared-steps", task, method(name), 400)
        theirs = stored_runs(folder / "passes", task, method(_EXACT), 400)
        for seeds, values in _beside(ours, theirs):
            lines[shown, called, seeds] = values
    note = (
        "Exact forecasts after 400 rows. Before: five fits of 140 steps at most, which stop early "
        "except on tweets. A step of the upper three layers takes half the time. Standard errors "
        "over seeds, of one seed over test rows."
    )
    head = ["task", "components", "seeds"]
    return Table.of_numbers("Five components in fewer steps", head, lines, note)


def _beside(
    ours: dict[int, Outcome], theirs: dict[int, Outcome]
) -> Iterator[tuple[str, dict[str, Number]]]:
    """The number of runs of the same data, and their NLLs and steps; nothing without any."""
    pairs = {
        seed: (run, theirs[seed])
        for seed, run in ours.items()
        if seed in theirs and theirs[seed].facts["data"] == run.facts["data"]
    }
    if pairs:
        one, other = (
            {seed: pair[which].forecasts["test"].nlls() for seed, pair in pairs.items()}
            for which in (0, 1)
        )
        steps = [_steps(run) / _steps(before) for run, before in pairs.values()]
        yield (
            str(len(pairs)),
            {
                "nll before": mean_and_error([nlls.mean().item() for nlls in other.values()]),
                "nll": mean_and_error([nlls.mean().item() for nlls in one.values()]),
                "difference": difference(one, other)["nll"],
                "steps / before": mean_and_error(steps),
            },
        )


def _steps(outcome: Outcome) -> int:
    own = sum(component["steps"] for component in outcome.facts["components"])
    return own + int(outcome.facts.get("shared_steps", 0))


def likeness(one: AnyForecast, other: AnyForecast) -> dict[str, float]:
    """How like the exact forecast of the same rows, the `other`, one is."""
    values: dict[str, float] = {}
    if not isinstance(one, RatingForecast) and not isinstance(other, RatingForecast):
        values["same decision"] = (one.label == other.label).double().mean().item()
    if one.epistemic.std() > 0:
        correlation = spearmanr(one.epistemic, other.epistemic).statistic
        values["epistemic, rank correlation"] = float(correlation)
    return values
