"""From outcomes to tables: means over seeds, differences from the reference, and where from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .catalogue import REFERENCE, Experiment
from .differences import DIFFERENCES, difference
from .methods import Method
from .outcome import Outcome
from .results import file_of
from .scores import Score, scaled
from .tables import OVER_SEEDS, Number, Table, distinct

__all__ = ["stored_runs", "tables"]

Key = tuple[str, ...]


def stored_runs(folder: Path, task: str, wanted: Method, rows: int) -> dict[int, Outcome]:
    """What a folder holds of a method, by seed."""
    found = {}
    for seed in range(5):
        run = (task, rows, wanted.peft, wanted.inference, seed)
        path = file_of(folder, run, "safetensors")
        if path.exists():
            outcome = Outcome.read(path)
            found[seed] = scaled(outcome) if wanted.scaled else outcome
    return found


@dataclass(frozen=True)
class _Line:
    """One run's part in one row of a table: the row's first columns, and what the run says."""

    key: Key
    score: Score
    facts: Mapping[str, Any]


def tables(
    experiment: Experiment, methods: Sequence[Method], outcomes: Iterable[Outcome]
) -> list[Table]:
    """The tables of an experiment: for each task (and question about it) the scores, and how far
    the NLL is from the reference's.

    Args:
        experiment: what is looked at.
        methods: in the order of the rows.
        outcomes: of runs; those of other methods are left out.
    """
    by_table: dict[str, list[_Line]] = {}
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.facts["method"], []).append(outcome)
    for method in methods:
        for outcome in by_method.get(str(replace(method, scaled=False)), []):
            facts = outcome.facts
            for score in experiment.scores(scaled(outcome) if method.scaled else outcome):
                by = (score.by,) if experiment.by else ()
                key = (str(method), *by, f"{facts['temperature']:g}")
                by_table.setdefault(score.table, []).append(_Line(key, score, facts))
    head = ["method", *([experiment.by] if experiment.by else []), "temperature"]
    made = []
    for title, lines in by_table.items():
        records = [
            dict(zip(head, line.key, strict=True)) | dict(line.score.values) for line in lines
        ]
        made.append(Table.over_seeds(title, head, records, _note([line.facts for line in lines])))
        if gaps := _differences(lines):
            title = f"{title}: NLL minus that of {REFERENCE}"
            made.append(Table.of_numbers(title, head, gaps, DIFFERENCES))
    return made


def _differences(lines: Sequence[_Line]) -> dict[Key, dict[str, Number]]:
    """From the reference's NLL, on the seeds that both have, where losses are known."""
    losses: dict[Key, dict[int, Tensor]] = {}
    for line in lines:
        if line.score.losses is not None:
            losses.setdefault(line.key, {})[line.facts["seed"]] = line.score.losses
    references = {key[1:-1]: seeds for key, seeds in losses.items() if key[0] == REFERENCE}
    return {
        key: difference(ours, references[key[1:-1]])
        for key, ours in losses.items()
        if key[0] != REFERENCE and ours.keys() & references.get(key[1:-1], {}).keys()
    }


def _note(facts: Sequence[Mapping[str, Any]]) -> str:
    """Where the numbers come from."""
    all_of = partial(distinct, facts)
    return (
        f"Commit {all_of('commit')}; {all_of('device')}; {all_of('backbone')}; "
        f"{all_of('rows')} rows of {all_of('source')}, {all_of('validation')} validation and "
        f"{all_of('test')} test rows, another split for every seed; at most "
        f"{all_of('steps')} steps, "
        f"settings tried for each method on the validation rows: {all_of('search')}; "
        f"{all_of('samples')} draws, {all_of('members')} members of an ensemble. {OVER_SEEDS} "
        "Temperature is the weight of the KL, 0 for maximum likelihood."
    )
