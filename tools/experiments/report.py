"""From outcomes to tables: means over seeds, tests against the reference, and where from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .catalogue import REFERENCE, Experiment
from .methods import Method
from .outcome import Outcome
from .scores import Score, scaled
from .significance import fits_p, holm, permutation_p
from .tables import Cell, Row, Table

__all__ = ["tables"]


@dataclass
class _Line:
    """What all seeds say in one line."""

    head: tuple[str, ...]
    scores: dict[int, Score]


def tables(
    experiment: Experiment, methods: Sequence[Method], outcomes: Iterable[Outcome]
) -> list[Table]:
    """The tables of an experiment, one a task (and what of it).

    Args:
        experiment: what is looked at.
        methods: in the order of the lines.
        outcomes: of runs; those of other methods are left out.
    """
    found: dict[str, dict[tuple[str, ...], _Line]] = {}
    facts: dict[str, list[Mapping[str, object]]] = {}
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.facts["method"], []).append(outcome)
    for method in methods:
        for outcome in by_method.get(str(Method(method.peft, method.inference)), []):
            used = scaled(outcome) if method.scaled else outcome
            for score in experiment.scores(used):
                temperature = f"{outcome.facts['temperature']:g}"
                head = (str(method), *((score.by,) if experiment.by else ()), temperature)
                lines = found.setdefault(score.table, {})
                lines.setdefault(head, _Line(head, {})).scores[outcome.facts["seed"]] = score
                facts.setdefault(score.table, []).append(outcome.facts)
    return [
        _table(experiment, title, list(lines.values()), facts[title])
        for title, lines in found.items()
    ]


def _table(
    experiment: Experiment,
    title: str,
    lines: Sequence[_Line],
    facts: Sequence[Mapping[str, object]],
) -> Table:
    rows = []
    columns: dict[str, None] = {}
    tested = _tested(lines)
    for line in lines:
        values: dict[str, list[float]] = {}
        for score in line.scores.values():
            for name, value in score.values.items():
                values.setdefault(name, []).append(value)
        cells = {name: Cell.of(numbers) for name, numbers in values.items()} | tested.get(
            line.head, {}
        )
        columns |= dict.fromkeys(cells)
        rows.append(Row((*line.head, str(len(line.scores))), cells))
    head = ("method", *((experiment.by,) if experiment.by else ()), "temperature", "seeds")
    last = sorted(columns, key=lambda name: name.startswith("p ("))
    return Table(title, head, tuple(last), rows, _note(facts, any(tested.values())))


def _tested(lines: Sequence[_Line]) -> dict[tuple[str, ...], dict[str, Cell]]:
    """P-values against the reference, on the seeds that both have, corrected over all of a kind."""
    references = {_by(line): line for line in lines if line.head[0] == REFERENCE}
    raw: dict[str, dict[tuple[tuple[str, ...], str], float]] = {"": {}, ", fits": {}}
    for line in lines:
        reference = references.get(_by(line))
        if reference is None or reference is line:
            continue
        seeds = sorted(line.scores.keys() & reference.scores.keys())
        if not seeds:
            continue
        for metric in line.scores[seeds[0]].losses:
            ours, theirs = (
                [each.scores[seed].losses[metric] for seed in seeds] for each in (line, reference)
            )
            key = line.head, metric
            raw[""][key] = permutation_p(torch.cat(ours), torch.cat(theirs))
            if len(seeds) > 1:
                means = ([each.mean().item() for each in of] for of in (ours, theirs))
                raw[", fits"][key] = fits_p(*means)
    found: dict[tuple[str, ...], dict[str, Cell]] = {}
    for kind, values in raw.items():
        for (head, metric), p in zip(values, holm([*values.values()]), strict=True):
            found.setdefault(head, {})[f"p ({metric}{kind})"] = Cell(p)
    return found


def _by(line: _Line) -> tuple[str, ...]:
    """What tells it from other lines of its method."""
    return line.head[1:-1]


def _note(facts: Sequence[Mapping[str, object]], tested: bool) -> str:
    """Where the numbers come from."""

    def all_of(name: str) -> str:
        return "/".join(dict.fromkeys(str(each[name]) for each in facts))

    text = (
        f"Commit {all_of('commit')}; {all_of('backbone')}; {all_of('rows')} rows of "
        f"{all_of('source')}, {all_of('validation')} validation and {all_of('test')} test rows, "
        f"another split for every seed; at most {all_of('steps')} steps, "
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
