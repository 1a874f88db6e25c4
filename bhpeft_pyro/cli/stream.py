"""`bhpeft stream`: batch after batch, each predicted first and then learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError, DataError
from . import options
from .recipe import Recipe, options_of_recipe
from .screen import bars, png, print_json, say, table

if TYPE_CHECKING:
    from datasets import Dataset

    from ..sequential import Record
    from .task import Task

__all__ = ["EXAMPLES", "stream"]

EXAMPLES = (
    "bhpeft stream news.jsonl --by date --every week --backbone minilm --out runs/news",
    "bhpeft stream reviews.csv --batch 100 --keep 0.9 --out runs/reviews-stream",
    "bhpeft stream reviews.csv --by date --batch 100 --grow --out runs/reviews-stream",
)

Period = Literal["day", "week", "month", "quarter", "year"]
# What the table on the screen shows, where the rounds have it.
_SHOWN = ("accuracy", "mse", "nll", "ece", "coverage_90", "drift/nll_z", "drift/nll_p")


@options.fitting("patience")
@options_of_recipe()
def stream(
    context: typer.Context,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(help="The folder of rounds, record and plots.", show_default=False)
    ],
    recipe: Recipe,
    by: Annotated[
        str | None, typer.Option(help="The column of dates.", show_default="rows are in order")
    ] = None,
    every: Annotated[
        Period | None,
        typer.Option(help="A batch is the rows of one such period.", show_default="week"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Rows a batch, in place of --every.", min=1, show_default=False),
    ] = None,
    config: options.Config = None,
    tests: Annotated[
        str,
        typer.Option(
            help="The share of each batch that is held out, and scored after every round.",
            metavar="SHARE",
        ),
    ] = "0",
    keep: options.Keep = 1.0,
    replay: Annotated[
        int | None,
        typer.Option(help="Keep so many examples back, which each round learns last.", min=1),
    ] = None,
    grow: options.Grow = False,
    again: options.Again = False,
    components: options.Components = None,
    samples: Annotated[int, typer.Option(help="Weight draws of a prediction.", min=19)] = 32,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Predict each batch of a table, then learn it, with the last posterior as the prior.

    Every round is saved. Killed and started again, or started again when rows of a new batch have
    come, it goes on after the last round. --out then holds rounds/, record.csv, record.json and
    stream.png.
    """
    from .. import sequential
    from ..data.encoding import cut_once, encode
    from ..guides import PRESETS
    from ..options import FitOptions
    from ..posterior import io
    from ..sequential import History, Record, Replay
    from .runs import hold_out, read_table

    how = FitOptions(progress=False).change(**options.given(context))
    if recipe.guide == "delta" or recipe.guide in PRESETS:
        raise ConfigError(
            f"--guide: {recipe.guide!r} has points, which cannot be the prior of a round"
        )
    held_out = options.fraction(tests, "--tests")
    if grow and held_out:
        raise ConfigError("--grow, --tests: early rounds cannot be tested on labels still to come")
    if every is not None and batch is not None:
        raise ConfigError(
            f"--every, --batch: a batch is a {every} or {batch} rows, not both; leave one out"
        )
    if io.exists(out):
        raise ConfigError(f"--out: {out} holds a posterior, and would hold a stream too")
    rows = read_table(data)
    found = recipe.task_of(rows)
    every_class = recipe.columns(found)
    batches = _batches(rows, by, every, batch)
    if grow:
        found = _known(found, *next(iter(batches.items())))
    cut = "1 batch" if len(batches) == 1 else f"{len(batches)} batches"
    say(f"{len(rows)} rows in {cut}, {found}")
    if more := [name for name in every_class.label_names or () if name not in (found.names or ())]:
        say(f"classes to come: {', '.join(more)}")
    tested: dict[str, object] = {}
    learnt: dict[str, object] = {}
    for name, each in batches.items():
        few = held_out and not 0 < round(held_out * len(each)) < len(each)
        if few:
            say(f"{name}: no test, as {tests} of {len(each)} rows are none, or all")
        learnt[name], test = hold_out(each, "0" if few else tests, how.seed)
        if test is not None:
            tested[name] = test
    if held_out and not tested:
        raise DataError(f"--tests: {tests} is no row of any batch; take more, or 0 for none")
    unlabelled = recipe.unlabelled_rows()
    model = recipe.model(found, device)
    if done := len(History(out / "rounds").rounds):
        say(f"rounds that are there already: {done}")
    with cut_once():
        # Before any batch is learnt, all rows are checked, under the numbers the file has. Rounds
        # read theirs again: with --grow, under the classes that are known by then.
        encode(
            rows,
            model.network.tokenizer,
            kind=model.likelihood.kind,
            columns=model.limited(every_class, rows),
        )
        last = sequential.stream(
            model,
            learnt,
            out,
            guide=recipe.guide,
            components=components,
            tests=tested,
            options=how,
            keep=keep,
            replay=None if replay is None else Replay(replay),
            grow=grow,
            again=again,
            samples=samples,
            progress=bars(),
            columns=recipe.columns(found),
            unlabelled=unlabelled,
        )
    record = Record.of(last)
    _plot(record, out)
    say(f"{last.report}\nthe last posterior is in {out / 'rounds' / last.report.id}")
    _show(record, as_json)


def _batches(
    rows: Dataset, by: str | None, every: Period | None, batch: int | None
) -> dict[str, Dataset]:
    from .. import sequential

    if batch is not None:
        return sequential.by_count(rows, batch, by)
    if by is None:
        raise ConfigError(
            f"--by, --batch: neither a column of dates nor a number of rows says what a batch is; "
            f"columns there: {', '.join(rows.column_names)}"
        )
    return sequential.by_period(rows, by, every or "week")


def _known(task: Task, batch: str, first: Dataset) -> Task:
    """The task with the classes of the first batch; any others are still to come."""
    from datasets import ClassLabel

    from ..data.columns import by_name

    label = task.columns.label
    if task.name != "classes" or isinstance(first.features[label], ClassLabel):
        return task
    values = set(by_name(first[label][:], first.features[label], task.names))
    if len(values) < 2:
        raise DataError(
            f"--grow: the first batch, {batch}, has the one class {values.pop()!r}; expected two "
            "or more to begin with: take longer batches"
        )
    if task.names is None:
        return replace(task, classes=max(values) + 1)
    names = tuple(name for name in task.names if name in values)
    return replace(task, names=names, classes=len(names))


def _plot(record: Record, out: Path) -> None:
    if len(record.rows) > 1:  # nothing is predicted before the first round
        import matplotlib.pyplot as plt

        from ..plots import stream_overview
        from ..posterior import io

        figure = stream_overview(record)
        io.write(out / "stream.png", png(figure))
        plt.close(figure)


def _show(record: Record, as_json: bool) -> None:
    square = len(record.tests) == len(record.rows) > 1
    # Rounds before a stream has grown have not seen the tests that came later.
    whole = square and not record.matrix.isnan().any()
    scores = record.transfer() if whole else {}
    if as_json:
        print_json({"rounds": record.rows, **scores})
        return
    shown = [name for name in _SHOWN if any(name in row for row in record.rows)]
    columns = ("batch", "examples", *shown)
    table("Each batch before it was learnt", columns, [
        [row.get(name) for name in columns] for row in record.rows
    ])  # fmt: skip
    if scores:
        table("Over all rounds", ("", ""), list(scores.items()))
