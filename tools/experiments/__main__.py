"""`python -m tools.experiments`: the tables behind what the documentation claims."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.cli.screen import say
from bhpeft_pyro.errors import ConfigError

from . import circle, cost, labels, new_labels, page, stream
from .budgets import BUDGETS, Budget
from .grid import grid_experiments
from .job import load_frozen
from .runs import Experiment, Given, results, selected
from .tables import publish

__all__ = ["app", "experiment", "experiments"]


def experiments(budget: Budget) -> dict[str, Experiment]:
    """All of them, by name."""
    return {
        **grid_experiments(budget),
        "labels": labels.experiment(budget),
        "stream": stream.EXPERIMENT,
        "round-cost": stream.COST,
        "new-labels": new_labels.EXPERIMENT,
        "circle": circle.EXPERIMENT,
        "cost": cost.experiment(budget),
    }


_NAMES = ", ".join(experiments(BUDGETS["tiny"]))


def experiment(
    name: Annotated[str, typer.Argument(help=f"{_NAMES}; or page.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="The folder of JSON lines files.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of results and tables.", show_default="runs/NAME"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A task, method, arm, ...; again for more.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE (JSON) in the setting; again for more."),
    ] = None,
    budget: Annotated[
        Literal["small", "tiny"], typer.Option(help="How much is done: on two cores, or a check.")
    ] = "small",
    backbone: Annotated[
        str | None,
        typer.Option(
            help="A name on the hub, a folder, minilm, mpnet or smollm2; random:LAYERSxWIDTH.",
            show_default="the budget's",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run; auto takes a GPU if any.")] = "auto",
) -> None:
    """Do the runs of an experiment that are missing, and make its tables.

    A run is a file in --out: a killed command continues where it stopped, and with all files there
    it only makes tables. `page` fits nothing: it makes the documentation's tables and figure from
    the files that the repository has.
    """
    if name == "page":
        page.write()
        say(f"tables and the figure are in {page.RESULTS}")
        return
    size = BUDGETS[budget]
    known = experiments(size)
    if name not in known:
        raise ConfigError(f"name: {name!r} is unknown; known: {_NAMES}, page")
    chosen, where = known[name], backbone or size.backbone
    load = partial(load_frozen, where, device)
    setting = {**chosen.setting, **_changes(change or (), chosen)}
    given = Given(setting, load, where, data, out or Path("runs") / name)
    runs = selected(chosen.runs(setting, seeds or chosen.seeds), only or ())
    made = chosen.tables(results(chosen, given, runs))
    publish(given.out / f"{name}-tables", chosen.about, made)
    typer.echo("\n\n".join(table.markdown() for table in made))


def _changes(change: list[str] | tuple[()], chosen: Experiment) -> dict[str, Any]:
    pairs = dict(one.split("=", 1) for one in change)
    if unknown := pairs.keys() - chosen.setting.keys():
        known = ", ".join(chosen.setting)
        raise ConfigError(f"--set: unknown {', '.join(sorted(unknown))}; known: {known}")
    return {name: _value(text) for name, text in pairs.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(spoken_errors()(quietly(experiment)))

if __name__ == "__main__":
    app(prog_name="python -m tools.experiments")
