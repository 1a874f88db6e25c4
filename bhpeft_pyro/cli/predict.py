"""`bhpeft predict`: predictions with their uncertainty, the least certain flagged."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ConfigError, DataError
from . import options
from .screen import say, table

_SUFFIXES = (".csv", ".jsonl")
_OF_CLASSES = ("variance", "confidence")


def predict(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    flag: Annotated[
        Any,
        typer.Option(
            help="Flag this share of the rows, the least certain.",
            metavar="SHARE",
            parser=options.share,
        ),
    ] = "10%",
    by: Annotated[
        Literal["total", "epistemic", "aleatoric", "variance", "confidence"],
        typer.Option(help="The uncertainty to rank by; the last two are for classes."),
    ] = "total",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file for the predictions.",
            show_default="DATA-predictions, beside DATA",
        ),
    ] = None,
    show: Annotated[int, typer.Option(help="How many rows to show on the screen.", min=0)] = 5,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave rows empty of which the backbone makes numbers that are not finite.",
        ),
    ] = False,
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out if it exists.")
    ] = False,
) -> None:
    """Predict new text, and flag the least certain predictions.

    The file has the data's columns, and for classes prediction, probability, epistemic and
    aleatoric uncertainty (nats) and flagged; for several labels the same, with a list of those that
    are more probable than not, and the probability of each; for words lists of these, one of each
    sentence; for ratings prediction, sd, the ends of the 90 % interval, epistemic and aleatoric
    variance and flagged.

    Examples:
        bhpeft predict runs/reviews new.csv --flag 10%
        bhpeft predict runs/reviews new.jsonl --flag 5% --by epistemic --out for-review.csv
    """
    from ..data.sources import load
    from ..files import write
    from .runs import open_run, rows_for

    if flag == 0:
        raise ConfigError("--flag: 0 flags no row; expected a share above 0")
    out = out or _beside(data)
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"--out: {out} should end in {' or '.join(_SUFFIXES)}")
    if out.resolve() == Path(data).resolve():
        raise ConfigError(f"--out: {out} is the data; expected another file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} exists already; --overwrite replaces it")
    posterior = open_run(run, backbone, device)
    kind = posterior.model.likelihood.kind
    if by in _OF_CLASSES and kind in ("labels", "rating"):
        what = "labels" if kind == "labels" else "ratings"
        raise ConfigError(f"--by: got {by!r} for {what}; expected total, epistemic or aleatoric")
    rows = rows_for(posterior, data, labelled=False)
    examples = posterior.model.encode_texts(rows, posterior.columns)
    kept = list(range(len(rows)))
    try:
        forecast = posterior.predict(examples, samples, seed=draw_seed)
    except DataError as error:
        kept = sorted({*kept} - {*error.rows})
        if not (skip_bad and error.rows and kept):
            raise
        say(f"note: no prediction for {len(error.rows)} rows. {error}")
        forecast = posterior.predict(examples.of_rows(kept), samples, seed=draw_seed)
    columns = forecast.summary()
    flagged = forecast.flag(flag, by).tolist()
    marks = {"flagged": [i in flagged for i in range(len(forecast))]}
    named = {name: forecast.by_row(each) for name, each in (columns | marks).items()}
    predicted = {row: {name: each[i] for name, each in named.items()} for i, row in enumerate(kept)}
    # The data's cells are written as they are in the file, not as numbers that were read.
    given, none = load(data, None).to_list(), dict.fromkeys(named)
    records = [row | predicted.get(i, none) for i, row in enumerate(given)]
    write(out, (_csv(records) if out.suffix == ".csv" else _json_lines(records)).encode())
    say(f"{len(examples)} {examples.unit}, {len(flagged)} flagged by {by}; written to {out}")
    if shown := forecast.flag(1.0, by)[:show].tolist():
        texts = [" ".join(text.split()) for text in forecast.texts or [""] * len(forecast)]
        numbers = kept if forecast.rows is None else forecast.rows.tolist()
        # Not the probabilities of each of several labels.
        columns = {k: v for k, v in columns.items() if not isinstance(v[0], dict)}
        table(
            f"Least certain ({by}); rows count from 0",
            ("row", *columns, "text"),
            [(numbers[i], *(values[i] for values in columns.values()), texts[i]) for i in shown],
        )


def _beside(data: str) -> Path:
    path = Path(data)
    if not path.is_file():  # it is on the hub
        return Path("predictions.csv")
    suffix = ".csv" if path.suffix.lower() == ".csv" else ".jsonl"
    return path.with_name(f"{path.stem}-predictions{suffix}")


def _json_lines(records: list[dict[str, Any]]) -> str:
    lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
    return "".join(f"{line}\n" for line in lines)


def _csv(records: list[dict[str, Any]]) -> str:
    text = StringIO()
    # The writer leaves a bare carriage return unquoted, and readers would end a row there.
    returns = any("\r" in cell for r in records for cell in r.values() if isinstance(cell, str))
    writer = csv.DictWriter(
        text,
        records[0].keys(),
        lineterminator="\n",
        quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL,
    )
    writer.writeheader()
    for record in records:
        nested = {k: json.dumps(v) for k, v in record.items() if isinstance(v, (list, dict))}
        writer.writerow(record | nested)
    return text.getvalue()
