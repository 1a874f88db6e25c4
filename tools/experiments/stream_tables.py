"""Tables of the experiments with streams, from their result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from bhpeft_pyro.sequential import Record

from .grid import commits
from .results import cell

__all__ = ["OURS", "aims", "average", "by_arm", "costs", "per_round", "summary", "summary_table"]

Result = dict[str, Any]

OURS, PLAIN, BOUND = "posterior as prior", "deterministic sequential", "all data so far"

# What is looked at for the final accuracy, whichever a protocol has first.
_FINAL = ("average_accuracy", "final accuracy", "accuracy")


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each arm, one a seed."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["arm"], []).append(result)
    return found


def average(results: Sequence[Result]) -> Record:
    """The mean record of one arm over seeds."""
    rows = []
    for same in zip(*(result["rounds"] for result in results), strict=True):
        numbers = [name for name, value in same[0].items() if not isinstance(value, str)]
        rows.append({**same[0], **{name: mean(row[name] for row in same) for name in numbers}})
    return Record(rows)


def summary(result: Result) -> dict[str, float]:
    """One run in a few numbers.

    `accuracy` and `nll` are those of predicting batches before they are learnt, over all their
    rows; with a final test there are its own, with one test a round the metrics of `transfer`.
    """
    record = Record(result["rounds"])
    rows = [row for row in record.rows if "nll" in row]
    count = sum(row["examples"] for row in rows)
    found = {
        name: sum(row[name] * row["examples"] for row in rows) / count
        for name in ("accuracy", "nll")
    }
    if "final" in result:
        found |= {f"final {name}": result["final"][name] for name in ("accuracy", "nll", "ece")}
    if record.tests:
        found |= record.transfer()
    return found


def summary_table(results: Sequence[Result]) -> Table:
    """Mean and standard error of each arm's `summary` over seeds."""
    summaries = _summaries(results)
    columns = next(iter(summaries.values()))[0]
    first = results[0]
    title = ", ".join(
        f"{name} {first[name]}"
        for name in ("protocol", "preset", "rows", "test", "epochs", "samples")
    )
    title += f", commit {commits(results)}"
    grid = Table("", "seeds", *columns, title=title, box=MARKDOWN)
    for arm, runs in summaries.items():
        cells = (cell([run[column] for run in runs]) for column in columns)
        grid.add_row(arm, str(len(runs)), *cells)
    return grid


def per_round(results: Sequence[Result], metric: str) -> Table:
    """A metric of each batch before it was learnt."""
    batches = [row["batch"] for row in results[0]["rounds"][1:]]
    title = f"{metric} of each batch before it was learnt"
    grid = Table("", *batches, title=title, box=MARKDOWN)
    for arm, runs in by_arm(results).items():
        rounds = zip(*(run["rounds"][1:] for run in runs), strict=True)
        grid.add_row(arm, *(cell([row[metric] for row in same]) for same in rounds))
    return grid


def costs(ratios: Mapping[str, float]) -> Table:
    """What a round costs, by arm."""
    grid = Table("", "cost / plain round", box=MARKDOWN)
    for arm, ratio in ratios.items():
        grid.add_row(arm, f"{ratio:.2f}")
    return grid


def aims(results: Sequence[Result], ratios: Mapping[str, float]) -> Table:
    """What was aimed at, what was measured, and whether that is enough.

    Arms that take the posterior as prior are held to: forgetting at most 20 % of plain sequential
    fine-tuning's; final accuracy within 1 point of a fit to all data; a round's cost at most 1.1
    times that of a plain round.
    """
    grid = Table("aim", "arm", "measured", "met", box=MARKDOWN)

    def add(aim: str, arm: str, measured: str, met: bool) -> None:
        grid.add_row(aim, arm, measured, "yes" if met else "no")

    means = {
        arm: {name: mean(run[name] for run in runs) for name in runs[0]}
        for arm, runs in _summaries(results).items()
    }
    for arm in (arm for arm in means if arm.startswith(OURS)):
        own, plain, bound = means[arm], means.get(PLAIN, {}), means.get(BOUND, {})
        if "forgetting" in own and plain:
            ours, theirs = own["forgetting"], plain["forgetting"]
            measured = f"{ours:.3f} against {theirs:.3f}"
            met = ours <= max(0.2 * theirs, 0.0)
            add("forgetting at most 20 % of fine-tuning's", arm, measured, met)
        if bound:
            name = next(name for name in _FINAL if name in own)
            gap = bound[name] - own[name]
            measured = f"{own[name]:.3f} against {bound[name]:.3f} ({name.replace('_', ' ')})"
            add("accuracy within 1 point of all data", arm, measured, gap <= 0.01)
        if arm in ratios:
            add("cost at most 1.1 plain rounds", arm, f"{ratios[arm]:.2f}", ratios[arm] <= 1.1)
    return grid


def _summaries(results: Sequence[Result]) -> dict[str, list[dict[str, float]]]:
    return {arm: [summary(run) for run in runs] for arm, runs in by_arm(results).items()}
