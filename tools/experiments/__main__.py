"""`python -m tools.experiments`: the tables and plots behind what the documentation claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from matplotlib.figure import Figure
from typer.core import TyperCommand

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.cli.screen import say
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

from .budgets import BUDGETS
from .catalogue import EXPERIMENTS
from .cost import ABOUT, cost
from .gradient_noise import ABOUT as gradient_noise_about
from .gradient_noise import gradient_noise
from .grid import Grid
from .guide_cost import ABOUT as guide_cost_about
from .guide_cost import guide_cost
from .job import Load
from .methods import method
from .plots import dots
from .publish import publish
from .report import tables
from .tables import Table

__all__ = ["app", "experiment"]

_TIMED = ("cost", "gradients")  # by the clock of the processor
# What is measured and not compared takes no other options than these, --seeds and --out.
_TAKES = {
    "cost": ("backbone", "samples"),
    "guides": (),
    "gradients": ("data", "backbone", "task", "rows", "steps"),
}

Name = Literal[
    "tasks",
    "ablation",
    "uncertainty",
    "shift",
    "rows",
    "samples",
    "cost",
    "guides",
    "gradients",
    "canary",
]


def experiment(
    name: Annotated[Name, typer.Argument(help="What is asked.", show_default=False)],
    budget: Annotated[
        Literal["full", "small", "tiny"],
        typer.Option(help="How much is done: on the hub's data, on two cores, or a check."),
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
            help="The frozen transformer: a name on the hub, a folder, minilm or smollm2.",
            show_default="the budget's",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds 0 to SEEDS - 1.", min=1, show_default="the budget's"),
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
        int | None,
        typer.Option(help="Rows of a test.", min=8, show_default="the budget's"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Draws of a Bayesian forecast.", min=2, show_default="32; small has 16, tiny 4"
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            help="Settings tried for each method.", min=1, max=2, show_default="the budget's"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder of result files, and of tables and plots.")
    ] = Path("runs/experiments"),
    device: Annotated[
        str,
        typer.Option(help="Where to run; auto takes a GPU if any. What is timed runs on the CPU."),
    ] = "auto",
) -> None:
    """Fit and compare methods; tables and plots are made from the result files alone.

    A run is a file in --out: what was killed goes on where it stopped, and with all files there
    only tables and plots are made.
    """
    numbers: dict[str, Any] = {"steps": steps, "test": test, "samples": samples, "search": search}
    others = {"data": data, "backbone": backbone, "task": task, "method": method_, "rows": rows}
    given = [option for option, value in {**others, **numbers}.items() if value is not None]
    if unused := set(given) - set(_TAKES.get(name, given)):
        raise ConfigError(f"--{', --'.join(sorted(unused))}: {name!r} does not depend on it")
    chosen = replace(BUDGETS[budget], **{k: v for k, v in numbers.items() if v is not None})
    count = seeds or chosen.seeds
    if name == "guides":
        made = [guide_cost(chosen.latents, count, out)]
        _publish(out / name, guide_cost_about, made, dots)
        return
    if budget == "small" and data is None and name != "cost":
        raise ConfigError("--data: the small budget reads JSON lines files; name their folder")
    if unknown := set(task or ()) - chosen.tasks.keys():
        raise ConfigError(
            f"--task: unknown {', '.join(sorted(unknown))}; known: {', '.join(chosen.tasks)}"
        )
    where = backbone or chosen.backbone
    load = _loader(where, "cpu" if name in _TIMED else device)
    if name == "cost":
        made = [cost(load, where, chosen, count, out)]
        _publish(out / name, ABOUT, made, dots)
        return
    if name == "gradients":
        first, *more = task or list(chosen.tasks)[:1]
        if more:
            raise ConfigError(f"--task: 'gradients' takes one task, got {len(more) + 1}")
        sized = replace(chosen, rows=rows or chosen.rows)
        made = [gradient_noise(load, where, sized, first, data, count, out)]
        _publish(out / name, gradient_noise_about, made, dots)
        return
    what = EXPERIMENTS[name]
    methods = [method(each) for each in method_ or what.methods]
    if name == "samples" and any(each.scaled for each in methods):
        raise ConfigError(
            "--method: scaling is of the mean over all draws; 'samples' takes methods without it"
        )
    tasks = task or chosen.plan[name]
    if name == "canary" and (real := [each for each in tasks if not chosen.tasks[each].shuffled]):
        raise ConfigError(
            f"--task: labels of {', '.join(real)} can be learnt; 'canary' takes tasks where they "
            "cannot, as 'labels of others'"
        )
    grid = Grid(
        budget=chosen,
        tasks=tasks,
        methods=methods,
        rows=(rows,) if rows else chosen.more_rows if name == "rows" else (chosen.rows,),
        seeds=count,
        load=load,
        backbone=where,
        data=data,
        out=out,
    )
    grid.complete()
    made = tables(what, grid.methods, grid.outcomes())
    _publish(out / name, what.about, made, what.draw)
    if what.check is not None:
        what.check(made)


def _publish(
    folder: Path, about: str, made: Sequence[Table], draw: Callable[[Table], Figure]
) -> None:
    publish(folder, about, made, draw)
    typer.echo("\n\n".join(table.markdown() for table in made))
    say(f"tables and plots are in {folder}")


def _loader(backbone: str, device: str) -> Load:
    if backbone == "tiny":
        return lambda: (tiny_backbone(), tiny_tokenizer())
    return partial(load_backbone, backbone, device)


class Spoken(TyperCommand):
    """A command whose errors are one line."""

    def invoke(self, ctx: Any) -> Any:
        with spoken_errors():
            return super().invoke(ctx)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=Spoken)(quietly(experiment))

if __name__ == "__main__":
    app(prog_name="python -m tools.experiments")
