"""Tables of the experiments with streams, from their result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bhpeft_pyro.forecast.metrics import mean_and_error
from bhpeft_pyro.streams import Record
from bhpeft_pyro.streams.record import TEST, TEST_NLL

from .arms import AT_ONCE, OURS
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["costs", "matrix", "stored_runs", "summary", "tables"]

Result = dict[str, Any]

_SETTING = ("preset", "rows", "test", "epochs", "samples")  # epochs are the defaults by now


def stored_runs(folder: Path, protocol: str) -> list[Result]:
    """The results of a protocol that a folder has, of all seeds and arms."""
    files = sorted(folder.glob(f"{protocol}.*.*.json"))
    return [json.loads(file.read_text()) for file in files]


def tables(results: Sequence[Result], title: str) -> list[Table]:
    """Each arm in a few numbers, and the Bayesian arms minus the others on the same seeds."""
    numbers: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        numbers.setdefault(result["arm"], {})[result["seed"]] = summary(result)
    records = [{"arm": arm, **line} for arm, seeds in numbers.items() for line in seeds.values()]
    named = [name for name in _SETTING if name in results[0]]
    setting = [f"{name} {distinct(results, name)}" for name in named]
    note = f"{OVER_SEEDS} Commits {distinct(results, 'commit')}; {', '.join(setting)}."
    made = [Table.over_seeds(title, ["arm"], records, note)]
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
    if lines:
        made.append(Table.of_numbers(f"{title}, differences", ["arm", "minus"], lines, OVER_SEEDS))
    return made


def costs(ratios: Mapping[str, float]) -> Table:
    """What a round of each arm costs."""
    lines = {(arm,): {"seconds / plain round": (ratio, nan)} for arm, ratio in ratios.items()}
    note = "Processor time of a round over that of a plain fit to its data, the median of three."
    return Table.of_numbers("Cost of a round", ["arm"], lines, note)


def summary(result: Result) -> dict[str, float]:
    """One run in a few numbers.

    Batches are predicted before they are learnt: means over all their rows. At the end there is
    one test, or one for each round. Then, with R[i, j] the score on test j after round i of T,
    backward transfer is the mean of R[T, j] - R[j, j] over j < T (Lopez-Paz and Ranzato 2017), and
    forgetting that of the largest R[i, j] of i < T, minus R[T, j] (Chaudhry et al. 2018).
    """
    record = Record(result["rounds"])
    rows = [row for row in record.rows if "nll" in row]
    count = sum(row["examples"] for row in rows)
    score = "accuracy" if "accuracy" in rows[0] else "mse"
    numbers = {
        f"{name} before learning": sum(row[name] * row["examples"] for row in rows) / count
        for name in (score, "nll")
    }
    if "final" in result:
        numbers |= {f"{name} at the end": result["final"][name] for name in ("accuracy", "nll")}
    batches = [row["batch"] for row in record.rows]
    if TEST + batches[0] in record.rows[0]:
        scores = matrix(record)  # of mean squared errors, what they are below zero
        last, at_the_end = scores[-1], scores[-1].mean().item()
        numbers[f"{score} at the end"] = at_the_end if score == "accuracy" else -at_the_end
        numbers["nll at the end"] = mean(record.rows[-1][TEST_NLL + name] for name in batches)
        numbers["forgetting"] = (scores[:-1].amax(0) - last)[:-1].mean().item()
        numbers["backward transfer"] = (last - scores.diagonal())[:-1].mean().item()
    if result["arm"].startswith(AT_ONCE):  # whose first round has learnt everything
        numbers = {name: v if "at the end" in name else nan for name, v in numbers.items()}
    return numbers


def matrix(record: Record) -> Tensor:
    """(T, T) R[i, j], the score on the test of batch j after round i."""
    return torch.stack([record.column(TEST + row["batch"]) for row in record.rows], 1)
