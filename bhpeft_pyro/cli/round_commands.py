"""`bhpeft stream` and `history`: round after round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..base import names
from ..errors import ConfigError, DataError, SaveError
from . import options
from .screen import print_json, say, table

if TYPE_CHECKING:
    import pandas as pd

    from ..data import Examples
    from ..streams import Record
    from ..training.report import FitReport

# Columns of the table on the screen, if the rounds have them.
_SHOWN = (
    *("accuracy", "mse", "nll", "ece", "coverage_90", "drift/nll_z", "drift/nll_p"),
    "drift/novel",
)
_FACTS = (
    *("id", "name", "examples", "temperature", "keep", "negative_elbo"),
    *("parent", "data", "metrics"),
)
_COLUMNS = ("id", "parent", "name", "examples", "keep")


def _period_or_rows(text: str) -> str | int:
    if text in get_args(names.Period):
        return text
    if not text.isdecimal() or int(text) == 0:
        periods = ", ".join(get_args(names.Period))
        raise typer.BadParameter(f"{text!r}; expected one of {periods}, or a number of rows")
    return int(text)


def stream(
    data: options.Data,
    out: Annotated[
        Path, typer.Option(help="The folder of rounds, record and plot.", show_default=False)
    ],
    reading: options.Reading,
    fitting: options.Fitting,
    by: Annotated[
        str | None, typer.Option(help="The column of dates.", show_default="rows are in order")
    ] = None,
    batch: Annotated[
        Any,
        typer.Option(
            help="A batch has the rows of a day, week, month, quarter or year, or this many rows.",
            metavar="PERIOD|ROWS",
            parser=_period_or_rows,
        ),
    ] = "week",
    config: options.Config = None,
    preset: options.Preset = "bh_peft",
    guide: Annotated[names.Family, typer.Option(help="The family of the posterior.")] = "laplace",
    components: options.Components = None,
    tests: Annotated[
        Any,
        options.share_option(
            "The share of each batch that is held out; after every round all are scored."
        ),
    ] = "0",
    keep: options.Keep = 1.0,
    grow: options.Grow = False,
    again: options.Again = False,
    distill: options.Distill = None,
    promise: Annotated[
        str | None,
        typer.Option(
            help="Labelled rows that are in no batch: every round makes a promise on them, as "
            "`promise` does, and the next batch tests it.",
            metavar="DATA",
            show_default="no promise",
            callback=options.check_data,
        ),
    ] = None,
    error: options.Error = None,
    tolerance: options.Tolerance = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Predict each batch of a table, then learn it, with the last posterior as the prior.

    Every round is saved. Started again after it was killed, or when rows of new batches have come,
    it continues after the last round. --out then holds rounds/, record.csv, record.json and
    stream.png.

    Examples:
        bhpeft stream news.jsonl --by date --batch week --backbone minilm --out runs/news
        bhpeft stream reviews.csv --batch 100 --keep 0.9 --out runs/reviews-stream
    """
    from .. import FitOptions, presets, streams
    from ..data.encoding import cut_once
    from ..data.table import table as read_table
    from ..posterior import saving
    from ..streams.stream import about, encode_ahead
    from . import saved, tables
    from .task import infer

    how = FitOptions().change(**fitting.given)
    if grow and tests:
        raise ConfigError("--grow, --tests: early rounds cannot be tested on labels still to come")
    if promise is None and (error is not None or tolerance is not None):
        raise ConfigError("--error, --tolerance: they are of a promise; expected --promise too")
    if saving.exists(out):
        raise ConfigError(f"--out: {out} holds a posterior; expected another folder")
    saved.check_folder(out)
    saved.check_inputs(out, ["record.csv", "record.json"], data, distill, promise)

    def read(file: str | None) -> pd.DataFrame | None:
        return None if file is None else read_table(file, reading.texts, reading.encoding)

    whole = tables.LabelledTable(data, reading)
    promised = None
    if promise is not None:
        promised = {"error": error, "tolerance": tolerance, "calibration": read(promise)}
    rounds = [*streams.History(out / saved.ROUNDS).rounds.values()]
    batches = _batches(whole.rows, batch, by, rounds)
    task = whole.task
    if grow and task.name == "classes":
        # All rows have been looked at; the classes of the other batches come later.
        first = next(iter(batches))
        with about(f"--grow: the first batch, {first}"):
            task = infer(batches[first], reading)
    say(f"{len(batches)} batch{'es' * (len(batches) > 1)}" + f", {task}" * (task is not whole.task))
    model = task.model(*whole.backbone(device), getattr(presets, preset)())
    if rounds:
        _check_tested(out, rounds, bool(tests))
        none = "; none is new" if len(rounds) == len(batches) else ""
        say(f"rounds that exist already: {len(rounds)}{none}")
    with cut_once():
        # All rows are checked before any is learnt, so that errors count rows as the file does.
        # With --grow the classes to come count too, which `task.columns` does not know yet.
        examples = encode_ahead(model, whole.rows, whole.task.columns)
        learnt: dict[str, pd.DataFrame] = batches
        tested: dict[str, pd.DataFrame] = {}
        if tests:
            learnt, tested = _with_tests(
                batches, lambda rows: model.encode_texts(rows, task.columns), tests, how.seed
            )
        tables.say_labels(examples, whole.task.levels)
        last = streams.stream(
            model,
            learnt,
            out,
            guide=guide,
            components=components,
            tests=tested,
            options=how,
            keep=keep,
            grow=grow,
            again=again,
            distill=read(distill),
            promise=promised,
            columns=task.columns,
        )
    record = streams.Record.of(last)
    _say_record(record, out, len(rounds))
    if len(rounds) < len(batches):
        say(f"{last.report}")
    say(f"the last posterior is in {out / saved.ROUNDS / last.report.id}")
    _show(record, last.model.likelihood.kind == "rating", as_json)


def _batches(
    rows: pd.DataFrame, batch: Any, by: str | None, rounds: Sequence[FitReport]
) -> dict[str, pd.DataFrame]:
    """The batches by name, of a period or of so many rows; those of earlier `rounds` stay."""
    from .. import streams

    if isinstance(batch, int):
        return streams.by_count(rows, batch, by, [report.name for report in rounds])
    if by is not None:
        return streams.by_period(rows, by, batch)
    raise ConfigError(
        f"--by: a batch of a {batch} needs a column of dates; columns there: "
        f"{', '.join(rows)} (--batch 100 needs none)"
    )


def _check_tested(out: Path, rounds: Sequence[FitReport], tests: bool) -> None:
    """Refuse to begin or to end testing after the first round, which may be interrupted."""
    from ..streams.record import TEST

    before = any(name.startswith(TEST) for report in rounds for name in report.metrics)
    if tests != before and (len(rounds) > 1 or before):
        there = "tests" if before else "no tests"
        raise ConfigError(f"--tests: {out} holds rounds with {there}; expected it as before")


def _say_record(record: Record, out: Path, done: int) -> None:
    """Draw the stream, and say which promises were broken since the rounds `done` before."""
    from ..base.files import write
    from ..decisions.watching import in_words

    if len(record.rows) > 1:  # nothing is predicted before the first round
        from matplotlib import pyplot  # which is slow to import

        from ..plots import stream_overview
        from ..plots.html import png

        figure = stream_overview(record)
        write(out / "stream.png", png(figure))
        pyplot.close(figure)
    for row in record.rows[done:]:
        if row.get("promise/broken"):
            say(
                f"note: {row['batch']}: the promise of the round before {in_words(row)}; new "
                "calibration rows renew it"
            )


def _with_tests(
    batches: dict[str, pd.DataFrame],
    read: Callable[[pd.DataFrame], Examples],
    tests: float,
    seed: int,
) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """By batch, the rows that are learnt, and a random share held out; copies of a text are all in
    one of the two."""
    import numpy as np
    import torch

    from ..data.copies import apart

    learnt, tested = {}, {}
    for name, rows in batches.items():
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
        kept, held_out = apart(order, read(rows).hashes, round(tests * len(rows)))
        if len(kept) and len(held_out):
            learnt[name], tested[name] = rows.iloc[kept], rows.iloc[held_out]
        else:
            learnt[name] = rows
            say(f"{name}: no test, as {tests:.3g} of {len(rows)} rows is none, or all")
    if not tested:
        raise DataError(f"--tests: {tests:.3g} is no row of any batch; expected more, or 0")
    return learnt, tested


def _show(record: Record, rated: bool, as_json: bool) -> None:
    from ..streams.record import TEST, TEST_NLL

    if as_json:
        print_json({"rounds": record.rows})
        return
    shown = [name for name in _SHOWN if any(name in row for row in record.rows)]
    columns = ("batch", "examples", *shown)
    cells = [[row.get(name) for name in columns] for row in record.rows]
    table("Each batch before it was learnt", columns, cells)
    last = record.rows[-1]
    tests = [row["batch"] for row in record.rows if TEST + row["batch"] in last]
    if tests:
        score, sign = ("mse", -1) if rated else ("accuracy", 1)
        cells = [[name, sign * last[TEST + name], last[TEST_NLL + name]] for name in tests]
        table("After the last round", ("test", score, "nll"), cells)


def history(
    folder: Annotated[
        Path, typer.Argument(help="A saved posterior, a stream, or a folder of saved posteriors.")
    ],
    round: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="ROUND",
            help="Keep the line of rounds that ends in this one (its id, the beginning of it, or "
            "its folder's name), and move all others into the folder aside.",
            show_default="all stay",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what each round learnt, a line for each, parents first.

    A stream continues only a single line of rounds. If there are branches, --keep chooses one;
    nothing is deleted. If rounds made promises (bhpeft stream --promise), a column says whether the
    promise of the round before still held for the data of this one. Below the table are the labels
    that came back to bhpeft serve.

    Examples:
        bhpeft history runs/reviews-2
        bhpeft history runs/stream --json
        bhpeft history runs/stream --keep 5f0c
    """
    from ..posterior import saving
    from ..serving.feedback import Tally
    from ..streams import History

    history = History.of(folder)
    single = saving.exists(folder)
    if round is not None:
        if single:
            raise ConfigError(f"--keep: {folder} is a posterior; expected a folder of rounds")
        for path in history.keep_only(round):
            say(f"moved to {path}")
    rounds = tuple(history.rounds.values())
    if single:
        rounds = saving.read_lineage(folder, saving.read_plain(folder))
    if not rounds:
        raise SaveError(f"folder: no saved posterior and no rounds in {folder}")
    folders = {rounds[-1].id: folder} if single else history.folders
    labels = {}
    for id, path in folders.items():
        try:
            labels[id] = Tally.of(path, id)
        except (SaveError, OSError) as error:
            say(f"note: the labels of {id} are left out: {error}")
    if as_json:
        facts = [
            {
                **{name: getattr(report, name) for name in _FACTS},
                "folder": str(folders[report.id]) if report.id in folders else None,
                "feedback": tally.plain if (tally := labels.get(report.id)) else None,
            }
            for report in rounds
        ]
        print_json({"rounds": facts})
        return
    columns = {name: [getattr(report, name) for report in rounds] for name in _COLUMNS}
    # What the data of a round said of the promise of the round before.
    broken = [report.metrics.get("promise/broken") for report in rounds]
    if any(value is not None for value in broken):
        words = {None: None, 0.0: "holds", 1.0: "broken"}
        columns["promise"] = [words[value] for value in broken]
    columns["held-out NLL"] = [report.metrics.get("held_out/nll") for report in rounds]
    if not single and any(path.name != id for id, path in folders.items()):
        columns["folder"] = [folders[report.id].name for report in rounds]
    table("Rounds", [*columns], [*zip(*columns.values(), strict=True)])
    for id, tally in labels.items():
        if tally:
            typer.echo(f"{id}: {tally}, of those that came back to bhpeft serve")
