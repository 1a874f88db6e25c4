"""How many labels a queue saves: `python -m tools.experiments.labels`.

A pool of texts, whose labels are bought in batches. Each arm buys the texts that it chooses, and a
new model is fitted to all labels bought so far. A file for each arm, seed and number of labels: a
killed run goes on with the next batch. Tables are made from the files alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from bhpeft_pyro.base.files import write
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import CutWarning
from bhpeft_pyro.decisions.queue import first_to_label
from bhpeft_pyro.model.backbone import device_named
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .budgets import BUDGETS
from .job import Load, load_frozen
from .labels_report import RANDOM, tables
from .methods import PEFT
from .results import check_names, file_of, load, run_all
from .tables import publish
from .tasks import Split, Task, split

__all__ = ["ARMS", "Arm", "Bought", "labels"]

SIZES = (20, 40, 80, 120, 160, 200, 250, 300, 400)
"""Labels bought, after each batch."""
POOL = 2000
"""Texts whose labels can be bought."""
_UNLABELLED = 400  # of them, which show along which axes texts differ
_SCORES = "scores.jsonl"  # all results but the rows that were bought, which no table needs
_TASKS = {
    "small": ("news-agnews", "sst, stars", "sentiment-tweets"),
    "tiny": ("classes", "ratings", "choices"),
}

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


_READ: dict[bytes, Tensor] = {}


@dataclass(frozen=True)
class _Remembering(Head):
    """A head that never runs the frozen transformer twice on a text: for fits without PEFT weights,
    whose features never change."""

    def read(
        self,
        backbone: PreTrainedModel,
        inputs: Mapping[str, Any],
        mask: Tensor,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        texts = zip(inputs["input_ids"], mask.bool(), strict=True)
        keys = [ids[real].cpu().numpy().tobytes() for ids, real in texts]
        if any(key not in _READ for key in keys):
            features = super().read(backbone, inputs, mask, *more, **named)
            _READ.update(zip(keys, features, strict=True))
        return torch.stack([_READ[key] for key in keys])


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

    def after(self, arm: Arm, rows: list[int], n: int) -> dict[str, Any]:
        """What is known after these rows have been bought, and the next n."""
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
        return {"rows": rows, "next": following, "scores": scores}

    @property
    def texts(self) -> Dataset:
        """The pool without its labels."""
        return self.data.train.select_columns(list(self.task.inputs))

    def model(self, kinds: Any) -> Model:
        """One that is not fitted."""
        torch.manual_seed(self.seed)
        backbone, tokenizer = self.load()
        head = (Head if kinds else _Remembering)(self.task.outputs)
        network = RandomPEFT(backbone, kinds, head, tokenizer)
        return Model(network, None, self.task.likelihood())


def labels(
    budget: Annotated[
        Literal["small", "tiny"], typer.Option(help="On two cores, or a check.")
    ] = "small",
    data: Annotated[Path | None, typer.Option(help="Folder with the JSON lines files.")] = None,
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/labels"),
    task: Annotated[list[str] | None, typer.Option(help="A task; again for more.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="An arm; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = 5,
    most: Annotated[int, typer.Option(help="Labels to buy, at most.", min=8)] = SIZES[-1],
    pool: Annotated[int, typer.Option(help="Texts whose labels can be bought.", min=8)] = POOL,
    test: Annotated[int | None, typer.Option(help="Rows of the test.", min=8)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a fit.", min=1)] = None,
    peft: Annotated[str, typer.Option(help="The PEFT weights.")] = "hybrid",
    components: Annotated[int, typer.Option(help="Of the posterior.", min=1)] = 5,
    backbone: Annotated[str | None, typer.Option(help="As for tools.experiments.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "auto",
) -> None:
    """Buy labels; with all results there, only tables are made."""
    chosen = BUDGETS[budget]
    tasks, arms = task or list(_TASKS[budget]), arm or list(ARMS)
    check_names("task", tasks, chosen.tasks)
    check_names("arm", arms, ARMS)
    check_names("peft", [peft], PEFT)
    sizes = [size for size in SIZES if size <= most]
    where = backbone or chosen.backbone
    setting: dict[str, Any] = {
        "sizes": sizes,
        "pool": pool,
        "test": test or chosen.test,
        "steps": steps or chosen.steps,
        "peft": peft,
        "components": components,
        "backbone": where,
    }
    runs = list(product(tasks, range(seeds), arms, sizes))
    _READ.clear()  # of another transformer, perhaps
    load_one = partial(load_frozen, where, str(device_named(device)))

    def result(name: str, seed: int, called: str, size: int) -> dict[str, Any]:
        of = chosen.tasks[name]
        parts = split(data, of, pool, 0, setting["test"], seed)
        bought = Bought(of, parts, load_one, peft, components, setting["steps"], seed)
        at = sizes.index(size)
        if at:
            before = json.loads(file_of(out, (name, seed, called, sizes[at - 1])).read_text())
            rows = before["rows"] + before["next"]
        else:
            rows = bought.first(ARMS[called], size)
        n = sizes[at + 1] - size if at + 1 < len(sizes) else 0
        facts = {"task": name, "seed": seed, "arm": called, "labels": size, "data": parts.digest}
        return {**facts, **bought.after(ARMS[called], rows, n)}

    with warnings.catch_warnings():
        # A task says how long its texts may be.
        warnings.filterwarnings("ignore", category=CutWarning)
        for size in sizes:  # each needs the one before, which another process may be at
            run_all(out, [run for run in runs if run[-1] == size], setting, result)
    results = load(out, runs)
    scores = [{k: v for k, v in one.items() if k not in ("rows", "next")} for one in results]
    write(out / _SCORES, "".join(f"{json.dumps(one)}\n" for one in scores).encode())
    made = tables(results)
    publish(out / "tables", "How many labels does a queue save?", made)
    typer.echo("\n\n".join(table.markdown() for table in made))


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(labels)))
