"""The head's prior scale as `fit` finds it, against fixed ones.

Run by `python -m bhpeft_pyro.experiments.head_scale`. Head only, on frozen features: a fit takes
seconds. The bound (on training rows) is what the search goes by; the NLL (on test rows) is what it
is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, logging

from ..demo.assets import minilm
from ..errors import BHPEFTError
from ..fitting import fit
from ..head import Head
from ..metrics import evaluate
from ..model import Model
from ..network import RandomPEFT
from ..priors import FunctionSpaceNormal
from .budgets import BUDGETS
from .results import cell, known, show
from .tasks import Split, Task, split

__all__ = ["head_scale"]

_TASKS = ("news-agnews", "sentiment-movies", "commonsense-socialiqa")
SCALES = (None, 0.3, 1.0, 3.0, 10.0)


def head_scale(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    task: Annotated[list[str] | None, typer.Option(help="A task; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 15,
    test: Annotated[int, typer.Option(help="Test rows.")] = 400,
) -> None:
    """Fit at each scale and print a table a task."""
    budget = BUDGETS["small"]
    tasks = budget.tasks
    names = task or _TASKS
    known(names, tasks)
    logging.disable_progress_bar()
    try:
        backbone = minilm()
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        for name in names:
            rows: dict[float | None, list[dict[str, float]]] = {scale: [] for scale in SCALES}
            for seed in track(range(seeds), name, console=Console(stderr=True)):
                parts = split(data, tasks[name], budget.rows, 0, test, seed)
                for scale, results in rows.items():
                    results.append(
                        _run(tasks[name], parts, backbone, tokenizer, scale, seed, epochs)
                    )
            show(_table(name, rows))
    except BHPEFTError as error:
        raise typer.BadParameter(str(error)) from error


def _run(
    task: Task,
    parts: Split,
    backbone: Path,
    tokenizer: PreTrainedTokenizerBase,
    scale: float | None,
    seed: int,
    epochs: int,
) -> dict[str, float]:
    torch.manual_seed(seed)
    network = RandomPEFT(AutoModel.from_pretrained(backbone), (), Head(task.outputs), tokenizer)
    posterior = fit(
        Model(network, FunctionSpaceNormal(head=scale), task.likelihood()),
        "normal",
        parts.train,
        columns=task.columns,
        max_length=task.max_length,
        epochs=epochs,
        seed=seed,
        progress=False,
    )
    assert isinstance(posterior.model.prior, FunctionSpaceNormal)
    return {
        "scale": posterior.model.prior.head or 1.0,
        "negative ELBO": posterior.report.last("loss"),
        "test NLL": evaluate(posterior.predict(parts.tests["test"], 64, max_rows=2**16))["nll"],
    }


def _table(name: str, rows: dict[float | None, list[dict[str, float]]]) -> Table:
    first = next(iter(rows.values()))
    title = f"{name}, head only, mean ± standard error of {len(first)} seeds"
    grid = Table("head", *first[0], title=title, box=MARKDOWN)
    for scale, results in rows.items():
        cells = (cell([result[column] for result in results]) for column in first[0])
        grid.add_row("found by fit" if scale is None else "fixed", *cells)
    return grid


if __name__ == "__main__":
    typer.run(head_scale)
