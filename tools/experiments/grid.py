"""The grid of (task, rows, PEFT weights, inference, seed), and the questions that are put to it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bhpeft_pyro import __version__
from bhpeft_pyro.data import CutWarning
from bhpeft_pyro.errors import ConfigError

from . import decisions, scores
from .budgets import Budget
from .job import Job
from .machine import device_name
from .methods import INFERENCE, PEFT, Method, method
from .outcome import Outcome
from .runs import Experiment, Given, Run, Setting, commit, file_of
from .scores import Score, scaled
from .tables import OVER_SEEDS, Table, distinct
from .tasks import split

__all__ = ["PASSES", "grid_experiments", "stored_runs"]

_ENDING = "safetensors"


def _all(peft: str, *inferences: str) -> tuple[str, ...]:
    return tuple(f"{peft}, {inference}" for inference in inferences)


_KINDS = ("head only", "adapter", "LoRA", "prefix", "MAM", "UniPELT", "hybrid")
_RIVALS = ("deterministic + scaling", "ensemble", "ensemble + scaling", "MC dropout", "MAP")
_BAYESIAN = ("one component", "Bayesian", "Bayesian (mean-field)")
_STUDENTS = tuple(f"student of {texts} texts" for texts in (0, 500, 2000))
_FEW = ("deterministic", "deterministic + scaling", "ensemble", "one component", "Bayesian")
PASSES = _all("hybrid", "deterministic + scaling", "ensemble + scaling", "Bayesian", *_STUDENTS)
"""The methods of "passes"."""
_PROMISED = _all("hybrid", "Bayesian", "ensemble + scaling", "deterministic + scaling")

_QUESTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Outcome], list[Score]]]] = {
    "tasks": (
        "How good is each method?",
        (*(f"{kind}, deterministic" for kind in _KINDS), *_all("hybrid", *_RIVALS, *_BAYESIAN)),
        scores.quality,
    ),
    "rows": ("How many rows does it take?", _all("hybrid", *_FEW), scores.quality),
    "passes": ("What do fewer passes lose?", PASSES, scores.passes),
    "promise": (
        "Is a promised error kept, and how much is answered?",
        _PROMISED,
        decisions.promise,
    ),
    "sets": ("Do sets and intervals have their coverage?", _PROMISED, decisions.sets),
    "novelty": (
        "Does it recognise what it has never seen?",
        ("head only, deterministic", "hybrid, ensemble", "hybrid, Bayesian"),
        decisions.novelty,
    ),
}


def grid_experiments(budget: Budget) -> dict[str, Experiment]:
    """The questions by name. They share their runs, if they have the same folder."""
    return {name: _experiment(budget, name) for name in _QUESTIONS}


def _experiment(budget: Budget, name: str) -> Experiment:
    about, methods, score = _QUESTIONS[name]
    train = budget.more_rows if name == "rows" else (budget.rows,)
    setting = {
        **budget.setting(),
        "train": list(train),
        "tasks": list(budget.plan[name]),
        "methods": list(methods),
    }
    return Experiment(
        about,
        _runs,
        partial(_run, budget),
        partial(_tables, score),
        setting,
        budget.seeds,
        Outcome.read,
        _ENDING,
    )


def _runs(setting: Setting, seeds: int) -> list[Run]:
    """All runs, whole seeds first, so that a part of the grid is a smaller grid."""
    methods = [method(name) for name in setting["methods"]]
    fitted = dict.fromkeys((one.peft, one.inference) for one in methods)
    return [
        (task, rows, *pair, seed)
        for seed, task, rows, pair in product(
            range(seeds), setting["tasks"], setting["train"], fitted
        )
    ]


def _run(
    budget: Budget, given: Given, task: str, rows: int, peft: str, inference: str, seed: int
) -> bytes:
    """Fit and predict; the tests' labels are put to their forecasts afterwards."""
    code = commit()  # files may change while it runs
    chosen = {name: given.setting[name] for name in budget.setting()}
    budget = replace(budget, **chosen)
    if task not in budget.tasks:
        raise ConfigError(f"tasks: unknown {task}; known: {', '.join(budget.tasks)}")
    spec = budget.tasks[task]
    parts = split(given.data, spec, rows, budget.validation, budget.test, seed)
    for path in given.out.glob(f"{task}.{rows}.*.{seed}.{_ENDING}"):
        _check_data(path, Outcome.read(path).facts, parts.digest)
    data = parts.train, parts.validation, parts.unlabelled
    job = Job(spec, PEFT[peft](), given.load, *data, seed, budget)
    with warnings.catch_warnings():
        # A task says how long its texts may be.
        warnings.filterwarnings("ignore", category=CutWarning)
        started = time.process_time()
        fitted = INFERENCE[inference](job)
        between = time.process_time()
        forecasts = {"validation": fitted.predict(parts.validation)}
        for name, table in parts.tests.items():
            # What a method does not get it cannot use.
            forecasts[name] = fitted.predict(table.select_columns(list(spec.inputs)))
        ended = time.process_time()
        posterior = fitted.posterior
        for name, table in parts.tests.items():
            if spec.target in table.column_names:
                labels = posterior.encode(table).labels
                assert labels is not None
                forecasts[name] = forecasts[name].with_labels(labels)
    facts = {
        "task": task,
        "rows": rows,
        "method": str(Method(peft, inference)),
        "seed": seed,
        "backbone": given.backbone,
        **chosen,
        **fitted.facts,
        "source": spec.source,
        "data": parts.digest,
        "version": __version__,
        "commit": code,
        "device": device_name(posterior.model.network.device),
        "seconds": {"fit": between - started, "predict": ended - between},
        "weights": sum(site.numel for site in posterior.model.sites),
    }
    return Outcome(facts, forecasts).to_bytes()


def _check_data(path: object, facts: Mapping[str, Any], digest: str | None) -> None:
    """Other texts would be paired row by row."""
    if facts.get("data") != digest:
        raise ConfigError(f"--out: {path} was run with other data; take another folder")


def _tables(score: Callable[[Outcome], list[Score]], outcomes: Sequence[Outcome]) -> list[Table]:
    """The scores of each method, and of the same with temperature scaling."""
    data: dict[object, str | None] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        facts = outcome.facts
        name = f"{facts['task']}, {facts['method']}"
        same = data.setdefault((facts["task"], facts["rows"], facts["seed"]), facts.get("data"))
        _check_data(name, facts, same)
        for suffix, one in (("", outcome), (" + scaling", scaled(outcome))):
            for line in score(one):
                key = {"method": facts["method"] + suffix, "rows": line.by or str(facts["rows"])}
                records.setdefault(line.table, []).append(key | dict(line.values))
    facts_of = [outcome.facts for outcome in outcomes]
    names = ("commit", "device", "backbone", "validation", "test", "steps", "search", "members")
    note = ", ".join(f"{name} {distinct(facts_of, name)}" for name in names)
    return [
        Table.over_seeds(title, ["method", "rows"], lines, f"{note}. {OVER_SEEDS}")
        for title, lines in records.items()
    ]


def stored_runs(folder: Path, task: str, wanted: str, rows: int = 400) -> dict[int, Outcome]:
    """What a folder holds of a method, by seed."""
    found = {}
    chosen = method(wanted)
    for seed in range(5):
        path = file_of(folder, (task, rows, chosen.peft, chosen.inference, seed), _ENDING)
        if path.exists():
            outcome = Outcome.read(path)
            found[seed] = scaled(outcome) if chosen.scaled else outcome
    return found
