"""Deterministic against Bayesian, on real text: `python -m bhpeft_pyro.experiments.compare`.

One result file a run, written atomically: a killed comparison goes on where it stopped. The table
is made from the files alone.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import MARKDOWN
from rich.table import Table

from .. import __version__
from ..demo.assets import minilm
from ..errors import BHPEFTError
from .arms import ARMS, run_arm
from .data import TASKS, split
from .results import cell, complete, known, load, show

__all__ = ["compare", "table"]

# What is shown for a task, whichever of them it has.
SHOWN = ("accuracy", "mse", "nll", "ece", "coverage_90", "brier", "aurc", "mutual_information")


def compare(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/compare"),
    task: Annotated[list[str] | None, typer.Option(help="A task; again for more.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="An arm; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = 15,
    samples: Annotated[int, typer.Option(help="Draws of the Bayesian forecast.")] = 8,
    validation: Annotated[int, typer.Option(help="Validation rows, for the scaling.")] = 100,
    test: Annotated[int, typer.Option(help="Test rows.")] = 400,
) -> None:
    """Fit and compare; with all results there, only the table is printed."""
    names, arms = task or list(TASKS), arm or list(ARMS)
    known(names, TASKS)
    known(arms, ARMS)
    setting = {"epochs": epochs, "samples": samples, "validation": validation, "test": test}
    try:
        backbone = minilm()

        def result(name: str, seed: int, method: str) -> dict[str, Any]:
            rows = split(data, TASKS[name], seed, validation, test)
            return {
                "task": name,
                "seed": seed,
                "arm": method,
                "version": __version__,
                "backbone": backbone.parent.name,
                "rows": TASKS[name].rows,
                **setting,
                "metrics": run_arm(
                    ARMS[method], TASKS[name], rows, backbone, seed, epochs, samples
                ),
            }

        complete(out, product(names, range(seeds), arms), result)
    except BHPEFTError as error:
        raise typer.BadParameter(str(error)) from error
    for name in names:
        show(table(load(out, product([name], range(seeds), arms))))


def table(results: list[dict[str, Any]]) -> Table:
    """Mean and standard error over seeds of one task's results; an arm has two rows."""
    first = results[0]
    shown = [name for name in SHOWN if name in first["metrics"]["as is"]]
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    title = f"{first['task']}: {first['rows']} training rows, {first['test']} test rows"
    grid = Table("", "seeds", "epochs", *shown, title=title, box=MARKDOWN)
    for arm, runs in by_arm.items():
        epochs = "/".join(map(str, sorted({run["epochs"] for run in runs})))
        for version, label in (("as is", arm), ("scaled", f"{arm} + scaling")):
            values = ([run["metrics"][version][name] for run in runs] for name in shown)
            cells = map(cell, values)
            grid.add_row(label, str(len(runs)), epochs, *cells)
    return grid


if __name__ == "__main__":
    typer.run(compare)
