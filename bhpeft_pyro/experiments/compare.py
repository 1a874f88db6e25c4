"""Deterministic against Bayesian, on real text: `python -m bhpeft_pyro.experiments.compare`.

One result file a run, written atomically: a killed comparison goes on where it stopped. The table
is made from the files alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import __version__
from ..demo.assets import minilm
from ..errors import BHPEFTError
from ..metrics import standard_error
from ..saving import write
from .arms import ARMS, run_arms
from .data import TASKS, split

__all__ = ["compare", "table"]

# What is shown for a task, whichever of them it has.
SHOWN = ("accuracy", "mse", "nll", "ece", "coverage_90", "brier", "aurc", "mutual_information")


def compare(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/compare"),
    task: Annotated[list[str] | None, typer.Option(help="A task; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = 15,
    samples: Annotated[int, typer.Option(help="Draws of the Bayesian forecast.")] = 8,
    validation: Annotated[int, typer.Option(help="Validation rows, for the scaling.")] = 100,
    test: Annotated[int, typer.Option(help="Test rows.")] = 400,
) -> None:
    """Fit and compare; with all results there, only the table is printed."""
    console = Console()
    names = task or list(TASKS)
    if unknown := set(names) - TASKS.keys():
        raise typer.BadParameter(f"unknown task {', '.join(unknown)}; known: {', '.join(TASKS)}")
    setting = {"epochs": epochs, "samples": samples, "validation": validation, "test": test}
    out.mkdir(parents=True, exist_ok=True)
    runs = [(name, seed) for seed in range(seeds) for name in names]
    todo = [run for run in runs if not _file(out, *run).exists()]
    try:
        backbone = minilm()
        for name, seed in track(todo, "fitting", console=Console(stderr=True)):
            rows = split(data, TASKS[name], seed, validation, test)
            metrics = run_arms(TASKS[name], rows, backbone, seed, epochs, samples)
            result = {
                "task": name,
                "seed": seed,
                "version": __version__,
                "backbone": backbone.parent.name,
                "rows": TASKS[name].rows,
                **setting,
                "temperature": 1.0,
                "metrics": metrics,
            }
            write(_file(out, name, seed), json.dumps(result, indent=1).encode())
    except BHPEFTError as error:
        raise typer.BadParameter(str(error)) from error
    for name in names:
        console.print(table([json.loads(file.read_text()) for file in out.glob(f"{name}.*.json")]))


def table(results: list[dict[str, Any]]) -> Table:
    """Mean and standard error over seeds, an arm a row."""
    first = results[0]
    shown = [name for name in SHOWN if name in first["metrics"]["Bayesian"]]
    title = (
        f"{first['task']}: {first['rows']} training rows, {len(results)} seeds, "
        f"{first['backbone']}, {first['epochs']} epochs, S = {first['samples']}, temperature 1"
    )
    grid = Table("", *shown, title=title)
    for arm in ARMS:
        cells = []
        for name in shown:
            values = [result["metrics"][arm][name] for result in results]
            error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{error}")
        grid.add_row(arm, *cells)
    return grid


def _file(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}.{seed}.json"


if __name__ == "__main__":
    typer.run(compare)
