"""The grid of (task, rows, method, seed): each run's outcome is a file, whole or not at all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bhpeft_pyro import __version__
from bhpeft_pyro.data import CutWarning

from .budgets import Budget
from .job import Job, Load
from .machine import device_name
from .methods import INFERENCE, PEFT, Method
from .outcome import Outcome
from .results import Run, check_setting, commit, complete, file_of
from .tasks import Split, split

__all__ = ["Grid"]

_ENDING = "safetensors"


@dataclass(frozen=True)
class Grid:
    """Which runs there are, and how to do one.

    Attributes:
        budget: the setting.
        tasks: names in `budget.tasks`.
        methods: what is compared.
        rows: numbers of training rows.
        seeds: 0 to seeds - 1.
        load: makes a new copy of the backbone.
        backbone: its name.
        data: the folder of JSON lines files; None if there are none to read.
        out: the folder of outcomes.
    """

    budget: Budget
    tasks: Sequence[str]
    methods: Sequence[Method]
    rows: Sequence[int]
    seeds: int
    load: Load
    backbone: str
    data: Path | None
    out: Path

    @property
    def runs(self) -> list[Run]:
        """All runs, whole seeds first, so that a part of the grid is a smaller grid."""
        fitted = dict.fromkeys((method.peft, method.inference) for method in self.methods)
        return [
            (task, rows, peft, inference, seed)
            for seed, task, rows, (peft, inference) in product(
                range(self.seeds), self.tasks, self.rows, fitted
            )
        ]

    def complete(self) -> None:
        """Do the runs that are missing, so that what was killed goes on where it stopped.

        Raises:
            ConfigError: a file that is there is of another setting, or of other data.
        """
        self._check()  # before hours of work
        with warnings.catch_warnings():
            # A task says how long its texts may be.
            warnings.filterwarnings("ignore", category=CutWarning)
            complete(self.out, self.runs, lambda *run: self.run(*run).to_bytes(), _ENDING)

    def outcomes(self) -> Iterator[Outcome]:
        """What is there, run by run.

        Raises:
            ConfigError: a file is of another setting than this grid, or of other data than
                another method's, with which it is to be compared.
        """
        return (outcome for _, outcome in self._stored())

    def run(self, task: str, rows: int, peft: str, inference: str, seed: int) -> Outcome:
        """Fit and predict; the tests' labels are put to their forecasts afterwards."""
        code = commit()  # files may change while it runs
        spec = self.budget.tasks[task]
        parts = self._split(task, rows, seed)
        train, validation = parts.train, parts.validation
        data = train, validation, parts.unlabelled
        job = Job(spec, PEFT[peft](), self.load, *data, seed, self.budget)
        started = time.process_time()
        fitted = INFERENCE[inference](job)
        between = time.process_time()
        forecasts = {"validation": fitted.predict(validation)}
        for name, table in parts.tests.items():
            # What a method does not get it cannot use.
            texts = table.select_columns(list(spec.inputs))
            forecasts[name] = fitted.predict(texts)
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
            **self._setting(),
            **fitted.facts,
            "source": spec.source,
            "data": parts.digest,
            "version": __version__,
            "commit": code,
            "device": device_name(posterior.model.network.device),
            "seconds": {"fit": between - started, "predict": ended - between},
            "weights": sum(site.numel for site in posterior.model.sites),
        }
        return Outcome(facts, forecasts)

    def _check(self) -> None:
        """See that the runs that are missing would be of the rows of those that are there."""
        there = {_rows_of(run): outcome.facts for run, outcome in self._stored()}
        missing = {_rows_of(run) for run in self.runs if not self._file(run).exists()}
        for task, rows, seed in sorted(missing & there.keys()):
            now = {"data": self._split(task, rows, seed).digest}
            check_setting(self.out, there[task, rows, seed], now)

    def _stored(self) -> Iterator[tuple[Run, Outcome]]:
        data: dict[tuple[str, int, int], str | None] = {}
        for run in self.runs:
            path = self._file(run)
            if path.exists():
                outcome = Outcome.read(path)
                same = data.setdefault(_rows_of(run), outcome.facts.get("data"))
                check_setting(path, outcome.facts, {**self._setting(), "data": same})
                yield run, outcome

    def _file(self, run: Run) -> Path:
        return file_of(self.out, run, _ENDING)

    def _split(self, task: str, rows: int, seed: int) -> Split:
        budget = self.budget
        return split(self.data, budget.tasks[task], rows, budget.validation, budget.test, seed)

    def _setting(self) -> dict[str, Any]:
        return {"backbone": self.backbone, **self.budget.setting()}


def _rows_of(run: Run) -> tuple[str, int, int]:
    """What makes the data of a run."""
    task, rows, *_, seed = run
    return str(task), int(str(rows)), int(str(seed))
