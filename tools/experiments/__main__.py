"""`python -m tools.experiments`: the tables behind what the documentation claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.cli.screen import say
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.model.backbone import device_named

from . import cost, page
from .budgets import BUDGETS
from .catalogue import EXPERIMENTS
from .grid import Grid
from .job import load_frozen
from .methods import method
from .report import tables
from .results import check_names
from .tables import Table, publish

__all__ = ["app", "experiment"]

Name = Literal[
    "tasks",
    "rows",
    "passes",
    "promise",
    "sets",
    "novelty",
    "cost",
    "page",
]


def experiment(
    name: Annotated[Name, typer.Argument(help="What is asked.", show_default=False)],
    budget: Annotated[
        Literal["small", "tiny"], typer.Option(help="How much is done: on two cores, or a check.")
    ] = "small",
    data: Annotated[
        Path | None,
        typer.Option(
            help="The folder of JSON lines files that the small budget reads.", show_default=False
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="The frozen transformer: a name on the hub, a folder, minilm, mpnet or smollm2; "
            "random:LAYERSxWIDTH for costs alone.",
            show_default="the budget's",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1, show_default="the budget's")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task; again for more.", show_default="all of the experiment"),
    ] = None,
    method_: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="A method; again for more.", show_default="all of the experiment"
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Training rows.", min=8, show_default="the budget's")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps of a fit.", min=1, show_default="the budget's"),
    ] = None,
    test: Annotated[
        int | None, typer.Option(help="Rows of a test.", min=8, show_default="the budget's")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Draws of a Bayesian forecast.", min=2, show_default="the budget's"),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            help="Settings tried for each method.", min=1, max=2, show_default="the budget's"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of result files, and of tables.")] = Path(
        "runs/experiments"
    ),
    device: Annotated[
        str,
        typer.Option(help="Where to run; auto takes a GPU if any."),
    ] = "auto",
) -> None:
    """Fit and compare methods; tables are made from the result files alone.

    A run is a file in --out: a killed command continues where it stopped, and with all files there
    it only makes tables. `page` fits nothing: it makes the documentation's tables and
    figures from the files that the repository has.
    """
    if name == "page":
        page.write()
        say(f"tables and figures are in {page.RESULTS}")
        return
    given = {"steps": steps, "test": test, "samples": samples, "search": search}
    numbers: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    chosen = replace(BUDGETS[budget], **numbers)
    count = seeds or chosen.seeds
    where = backbone or chosen.backbone

    load = partial(load_frozen, where, device)
    if name == "cost":
        others = {"data": data, "task": task, "method": method_, "rows": rows, **numbers}
        if unused := [option for option, value in others.items() if value is not None]:
            raise ConfigError(f"--{', --'.join(sorted(unused))}: {name!r} does not depend on it")
        made = cost.cost(load, where, chosen, count, out, device_named(device))
        _publish(out / name, cost.ABOUT, made)
        return
    check_names("task", task or (), chosen.tasks)
    question = EXPERIMENTS[name]
    grid = Grid(
        budget=chosen,
        tasks=task or chosen.plan[name],
        methods=[method(spelled) for spelled in method_ or question.methods],
        rows=(rows,) if rows else chosen.more_rows if name == "rows" else (chosen.rows,),
        seeds=count,
        load=load,
        backbone=where,
        data=data,
        out=out,
    )
    grid.complete()
    made = tables(question, grid.methods, grid.outcomes())
    _publish(out / name, question.about, made)


def _publish(folder: Path, about: str, made: Sequence[Table]) -> None:
    publish(folder, about, made)
    typer.echo("\n\n".join(table.markdown() for table in made))
    say(f"tables are in {folder}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(spoken_errors()(quietly(experiment)))

if __name__ == "__main__":
    app(prog_name="python -m tools.experiments")
