"""How many labels a queue saves.

A pool of texts, whose labels are bought in batches. Each arm buys the texts that it chooses, and a
new model is fitted to all labels bought so far.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from datasets import Dataset

from bhpeft_pyro.data import CutWarning
from bhpeft_pyro.decisions.queue import first_to_label
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .budgets import Budget
from .job import Load
from .labels_report import RANDOM, tables
from .methods import PEFT
from .runs import Experiment, Given
from .tables import Table
from .tasks import Split, Task, split

__all__ = ["ARMS", "Arm", "Bought", "experiment"]

SIZES = (20, 40, 80, 120, 160, 200, 250, 300, 400)
"""Labels bought, after each batch."""
POOL = 2000
"""Texts whose labels can be bought."""
_UNLABELLED = 400  # of them, which show along which axes texts differ

Choose = Callable[[Posterior, Dataset, list[int], int, int], list[int]]
"""From the posterior, the pool, the rows bought, a number and a seed to the rows to buy next."""


@dataclass(frozen=True)
class Arm:
    """How texts are chosen.

    Attributes:
        first: before there is a posterior, "typical" or "random".
        then: with one.
    """

    first: Literal["typical", "random"]
    then: Choose


def _queued(
    by: Any, posterior: Posterior, pool: Dataset, bought: list[int], n: int, seed: int
) -> list[int]:
    rows: list[int] = posterior.queue(pool, n, by=by, seed=seed).rows.tolist()
    return rows


def _least_certain(
    posterior: Posterior, pool: Dataset, bought: list[int], n: int, seed: int
) -> list[int]:
    """By total uncertainty, each text by itself."""
    left = sorted({*range(len(pool))} - {*bought})
    order = posterior.predict(pool.select(left)).flag(1.0, by="total")[:n]
    return [left[i] for i in order.tolist()]


ARMS: dict[str, Arm] = {
    RANDOM: Arm("random", partial(_queued, "random")),
    "information": Arm("random", partial(_queued, "information")),
    "typical, then information": Arm("typical", partial(_queued, "information")),
    "total uncertainty": Arm("random", _least_certain),
}
"""What is compared."""


@dataclass(frozen=True)
class Bought:
    """One arm's purchases for one task and seed.

    Attributes:
        task: what is learnt.
        data: the pool is its training part.
        load: makes a new copy of the backbone.
        peft: a name in `methods.PEFT`.
        components: of the posterior.
        steps: of a fit, at most.
        seed: of the fits and choices.
    """

    task: Task
    data: Split
    load: Load
    peft: str
    components: int
    steps: int
    seed: int

    def first(self, arm: Arm, n: int) -> list[int]:
        """The first rows to buy."""
        columns = replace(self.task.columns, max_length=self.task.max_length)
        chosen = first_to_label(
            self.model(()), self.texts, n, by=arm.first, columns=columns, seed=self.seed
        )
        rows: list[int] = chosen.rows.tolist()
        return rows

    def after(self, arm: Arm, rows: list[int], n: int) -> tuple[dict[str, float], list[int]]:
        """The scores after these rows have been bought, and the next n."""
        model = self.model(PEFT[self.peft]())
        columns = replace(self.task.columns, max_length=self.task.max_length)
        some = self.texts.select(range(min(_UNLABELLED, len(self.data.train))))
        texts = model.encode_texts(some, columns)
        model.network.align(batch for _, batch in texts.by_length(32))
        posterior = fit(
            model,
            "laplace",
            self.data.train.select(rows),
            columns=columns,
            components=self.components,
            max_steps=self.steps,
            seed=self.seed,
            progress=False,
        )
        # Novelty, which nothing here is about, would take a pass of its own.
        posterior = posterior.replace(novelty=None)
        scores = posterior.evaluate(self.data.tests["test"])
        following = arm.then(posterior, self.texts, rows, n, self.seed) if n else []
        return scores, following

    @property
    def texts(self) -> Dataset:
        """The pool without its labels."""
        return self.data.train.select_columns(list(self.task.inputs))

    def model(self, kinds: Any) -> Model:
        """One that is not fitted."""
        torch.manual_seed(self.seed)
        backbone, tokenizer = self.load()
        network = RandomPEFT(backbone, kinds, Head(self.task.outputs), tokenizer)
        return Model(network, None, self.task.likelihood())


def _run(budget: Budget, given: Given, name: str, seed: int, arm: str) -> dict[str, Any]:
    """All purchases of an arm: what is known after each batch."""
    setting, task = given.setting, budget.tasks[name]
    parts = split(given.data, task, setting["pool"], 0, setting["test"], seed)
    how = setting["peft"], setting["components"], setting["steps"]
    bought = Bought(task, parts, given.load, *how, seed)
    sizes, batches = setting["sizes"], []
    with warnings.catch_warnings():
        # A task says how long its texts may be.
        warnings.filterwarnings("ignore", category=CutWarning)
        rows = bought.first(ARMS[arm], sizes[0])
        for size, following in zip(sizes, [*sizes[1:], sizes[-1]], strict=True):
            scores, more = bought.after(ARMS[arm], rows, following - size)
            batches.append({"labels": size, "rows": rows, "scores": scores})
            rows = rows + more
    facts = {"task": name, "seed": seed, "arm": arm, "data": parts.digest}
    return {**facts, "batches": batches}


def _tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    return tables([{**result, **batch} for result in results for batch in result["batches"]])


def experiment(budget: Budget) -> Experiment:
    """The purchases of a budget's tasks."""
    tasks = budget.plan["labels"]
    return Experiment(
        "How many labels does a queue save?",
        lambda setting, seeds: list(product(tasks, range(seeds), ARMS)),
        partial(_run, budget),
        _tables,
        {
            "sizes": list(SIZES),
            "pool": POOL,
            "test": budget.test,
            "steps": budget.steps,
            "peft": "hybrid",
            "components": 5,
        },
        budget.seeds,
    )
