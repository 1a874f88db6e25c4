"""The tables of how many labels a queue saves, from the files of `labels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bhpeft_pyro.forecast.metrics import mean_and_error

from .tables import OVER_SEEDS, Number, Table, distinct

__all__ = ["RANDOM", "tables"]

RANDOM = "random"
"""The arm that the others are compared with."""
_METRICS = ("accuracy", "mse", "nll")


def tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each task the quality after each batch, and how many labels an arm needs for what random
    texts reach with the most."""
    made = []
    for task in dict.fromkeys(result["task"] for result in results):
        facts = [one for one in results if one["task"] == task]
        records = [
            {"arm": one["arm"], "labels": str(one["labels"])}
            | {name: one["scores"][name] for name in _METRICS if name in one["scores"]}
            for one in facts
        ]
        note = (
            f"{distinct(facts, 'components')} components, {distinct(facts, 'peft')}, at most "
            f"{distinct(facts, 'steps')} steps; {distinct(facts, 'pool')} texts in the pool, "
            f"{distinct(facts, 'test')} in the test; commits {distinct(facts, 'commit')}. "
            f"{OVER_SEEDS}"
        )
        made.append(Table.over_seeds(f"Labels bought: {task}", ["arm", "labels"], records, note))
        if (needed := _needed(facts)) is not None:
            note = (
                "The labels at which an arm's curve, between batches a line, first reaches what "
                "random texts reach at the end of the same seed; the most if it never does. "
                f"{OVER_SEEDS}"
            )
            title = f"Labels for the quality of random ones: {task}"
            made.append(Table.of_numbers(title, ["arm"], needed, note))
    return made


def _needed(results: Sequence[Mapping[str, Any]]) -> dict[Any, dict[str, Number]] | None:
    curves: dict[tuple[str, int], dict[int, Mapping[str, float]]] = {}
    for one in results:
        curves.setdefault((one["arm"], one["seed"]), {})[one["labels"]] = one["scores"]
    counts: dict[Any, dict[str, list[float]]] = {}
    for (arm, seed), curve in curves.items():
        target = curves.get((RANDOM, seed))
        if target is None:
            continue
        goal = target[max(target)]
        for metric in _METRICS:
            if metric in goal:
                sign = -1 if metric == "accuracy" else 1
                points = [(size, sign * curve[size][metric]) for size in sorted(curve)]
                first = _first_at(points, sign * goal[metric])
                counts.setdefault((arm,), {}).setdefault(metric, []).append(first)
    if not counts:
        return None
    return {
        key: {name: mean_and_error(values) for name, values in line.items()}
        for key, line in counts.items()
    }


def _first_at(points: Sequence[tuple[int, float]], goal: float) -> float:
    """Where a curve first falls to a value; its end if it never does.

    >>> _first_at([(20, 1.0), (40, 0.5), (80, 0.4)], 0.75), _first_at([(20, 1.0), (40, 0.9)], 0.5)
    (30.0, 40.0)
    """
    before, last = points[0], points[0][0]
    for size, value in points:
        if value <= goal:
            share = 1.0 if before[1] <= goal else (before[1] - goal) / (before[1] - value)
            return before[0] + share * (size - before[0])
        before, last = (size, value), size
    return float(last)
