"""Tables and plots of the experiments with streams, from their result files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bhpeft_pyro.plots import score_matrix
from bhpeft_pyro.streams import Record

from .arms import OURS
from .tables import OVER_SEEDS, Table, distinct, mean_and_error

__all__ = ["average", "compared", "costs", "curves", "matrices", "stored_runs", "summary", "tables"]

Result = dict[str, Any]

_SHOWN = {  # of `summary`, and as the documentation calls it
    "accuracy": "accuracy before learning",
    "nll": "nll before learning",
    "average_accuracy": "accuracy at the end",
    "final accuracy": "accuracy at the end",
    "final nll": "nll at the end",
    "forgetting": "forgetting",
}


def tables(results: Sequence[Result], cost: Mapping[str, float]) -> list[Table]:
    """The summary of each arm, each batch before it was learnt, and what a round costs."""
    first = results[0]
    setting = ("preset", "rows", "test", "epochs", "samples")
    facts = [
        f"Commit {distinct(results, 'commit')}",
        *(f"{name} {first[name]}" for name in setting),
    ]
    note = ", ".join(facts) + "."
    records = [{"arm": each["arm"], **summary(each)} for each in results]
    made = [Table.over_seeds(first["protocol"], ["arm"], records, note)]
    for metric in ("accuracy", "nll"):
        rows = [
            {"arm": each["arm"], **{row["batch"]: row[metric] for row in each["rounds"][1:]}}
            for each in results
        ]
        made.append(Table.over_seeds(f"{metric} of each batch before it was learnt", ["arm"], rows))
    return [*made, costs(cost)]


def summary(result: Result) -> dict[str, float]:
    """One run in a few numbers.

    `accuracy` and `nll` are those of predicting batches before they are learnt, over all their
    rows. With a final test its metrics follow; with a test for each round those of `transfer`, and
    the mean NLL on all of them at the end.
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
        losses = [row for name, row in record.rows[-1].items() if name.startswith("test_nll/")]
        found |= {"final nll": mean(losses)} if losses else {}
    return found


def average(results: Sequence[Result]) -> Record:
    """The mean record of one arm over seeds."""
    rows = []
    for same in zip(*(result["rounds"] for result in results), strict=True):
        numbers = [name for name, value in same[0].items() if not isinstance(value, str)]
        rows.append({**same[0], **{name: mean(row[name] for row in same) for name in numbers}})
    return Record(rows)


def curves(results: Sequence[Result]) -> Figure:
    """Accuracy and NLL of each batch before it was learnt: the mean of each arm over seeds."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 7), layout="constrained", sharex=True)
    for arm, record in _records(results).items():
        names = [row["batch"] for row in record.rows[1:]]
        for ax, metric in zip(axes, ("accuracy", "nll"), strict=True):
            ax.plot(names, record.column(metric)[1:].numpy(), "o-", markersize=4, label=arm)
            ax.set_ylabel(metric)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize="small")
    axes[1].tick_params("x", rotation=45)
    axes[1].set_xlabel("batch")
    return figure


def matrices(results: Sequence[Result]) -> Figure:
    """R[i][j] of each arm, the mean over seeds: accuracy on test j after round i."""
    records = _records(results)
    columns = min(len(records), 2 if len(records) == 4 else 3)
    rows = -(-len(records) // columns)
    figure = plt.figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    low = min(record.matrix.min().item() for record in records.values())
    high = max(record.matrix.max().item() for record in records.values())
    for ax in axes[len(records) :]:
        ax.remove()
    for ax, (arm, record) in zip(axes, records.items(), strict=False):
        score_matrix(record, ax).set_title(arm, fontsize="small")
        ax.images[0].set_clim(low, high)
    return figure


def _records(results: Sequence[Result]) -> dict[str, Record]:
    arms = dict.fromkeys(result["arm"] for result in results)
    return {arm: average([each for each in results if each["arm"] == arm]) for arm in arms}


def stored_runs(folder: Path, protocol: str) -> list[Result]:
    """The results of a protocol that a folder has, of all seeds and arms."""
    files = sorted(folder.glob(f"{protocol}.?.*.json"))
    return [json.loads(file.read_text()) for file in files]


def compared(results: Sequence[Result], title: str) -> Iterator[Table]:
    """The documentation's tables of a stream: each arm, and the Bayesian ones minus the others."""
    numbers: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        measured = summary(result)
        line = {shown: measured[name] for name, shown in _SHOWN.items() if name in measured}
        numbers.setdefault(result["arm"], {})[result["seed"]] = line
    records = [{"arm": arm, **line} for arm, seeds in numbers.items() for line in seeds.values()]
    note = f"{OVER_SEEDS} Commits {distinct(results, 'commit')}."
    yield Table.over_seeds(title, ["arm"], records, note)
    ours = [arm for arm in (f"{OURS}, 5 components", OURS) if arm in numbers]
    pairs = [(first, other) for first in ours for other in numbers if other not in ours]
    pairs += [(first, OURS) for first in ours[:-1]]
    lines = {}
    for first, other in pairs:
        seeds = sorted(numbers[first].keys() & numbers[other].keys())
        lines[first, other] = {
            name: mean_and_error([numbers[first][s][name] - numbers[other][s][name] for s in seeds])
            for name in numbers[first][seeds[0]]
        }
    yield Table.of_numbers(f"{title}, differences", ["arm", "minus"], lines, OVER_SEEDS)


def costs(ratios: Mapping[str, float]) -> Table:
    """What a round of each arm costs."""
    lines = {(arm,): {"seconds / plain round": (ratio, nan)} for arm, ratio in ratios.items()}
    note = "Processor time of a round over that of a plain fit to its data, the median of three."
    return Table.of_numbers("Cost of a round", ["arm"], lines, note)
