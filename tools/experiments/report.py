"""From outcomes to tables: means over seeds, tests against the reference, and where from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .catalogue import REFERENCE, Experiment
from .methods import Method
from .outcome import Outcome
from .scores import Score, scaled
from .significance import fits_p, holm, permutation_p
from .tables import Table, distinct

__all__ = ["tables"]

Key = tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    """One run's part in one row of a table: the row's first columns, and what the run says."""

    key: Key
    score: Score
    facts: Mapping[str, Any]


def tables(
    experiment: Experiment, methods: Sequence[Method], outcomes: Iterable[Outcome]
) -> list[Table]:
    """The tables of an experiment, one for each task (and question about it).

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
    return [_table(experiment, title, lines) for title, lines in by_table.items()]


def _table(experiment: Experiment, title: str, lines: Sequence[_Line]) -> Table:
    head = ["method", *([experiment.by] if experiment.by else []), "temperature"]
    records = [dict(zip(head, line.key, strict=True)) | dict(line.score.values) for line in lines]
    tested = _tested(lines)
    note = _note([line.facts for line in lines], bool(tested))
    table = Table.over_seeds(title, head, records, note)
    for column, values in tested.items():
        keys = (tuple(row[:-1]) for row in table.means.index)  # without the number of seeds
        table.means[column] = [values.get(key, np.nan) for key in keys]
        table.errors[column] = np.nan
    return table


def _tested(lines: Sequence[_Line]) -> dict[str, dict[Key, float]]:
    """P-values against the reference on the seeds that both have, by column and row.

    Each kind of test is corrected over all comparisons of the table.
    """
    losses: dict[Key, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        losses.setdefault(line.key, {})[line.facts["seed"]] = line.score.losses
    references = {key[1:-1]: key for key in losses if key[0] == REFERENCE}
    raw: dict[str, dict[tuple[str, Key], float]] = {"": {}, ", fits": {}}
    for key, ours in losses.items():
        reference = references.get(key[1:-1])
        if reference is None or reference == key:
            continue
        theirs = losses[reference]
        seeds = sorted(ours.keys() & theirs.keys())
        for metric in ours[seeds[0]] if seeds else ():
            pair = [[run[seed][metric].numpy() for seed in seeds] for run in (ours, theirs)]
            ours_all, theirs_all = map(np.concatenate, pair)
            raw[""][metric, key] = permutation_p(ours_all, theirs_all)
            if len(seeds) > 1:
                means = ([float(loss.mean()) for loss in of] for of in pair)
                raw[", fits"][metric, key] = fits_p(*means)
    corrected: dict[str, dict[Key, float]] = {}
    for kind, values in raw.items():
        for (metric, key), p in zip(values, holm([*values.values()]), strict=True):
            corrected.setdefault(f"p ({metric}{kind})", {})[key] = p
    return corrected


def _note(facts: Sequence[Mapping[str, Any]], tested: bool) -> str:
    """Where the numbers come from."""

    all_of = partial(distinct, facts)
    text = (
        f"Commit {all_of('commit')}; {all_of('device')}; {all_of('backbone')}; "
        f"{all_of('rows')} rows of {all_of('source')}, {all_of('validation')} validation and "
        f"{all_of('test')} test rows, another split for every seed; at most "
        f"{all_of('steps')} steps, "
        f"settings tried for each method on the validation rows: {all_of('search')}; "
        f"{all_of('samples')} draws, {all_of('members')} members of an ensemble. Mean ± standard "
        "error over seeds; temperature is the weight of the KL, 0 for maximum likelihood."
    )
    if tested:
        text += (
            f" p: against {REFERENCE}, by paired permutation tests over the test rows of all seeds "
            "(are these fits better?) and, where it says fits, by paired t-tests over seeds (would "
            "others be?), each kind corrected by Holm's method for all of this table."
        )
    return text
