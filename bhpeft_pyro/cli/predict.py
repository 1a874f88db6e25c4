"""`bhpeft predict`: predictions with their uncertainty, the least certain flagged."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import options
from .screen import say, table

if TYPE_CHECKING:
    from datasets import Dataset

    from ..inference.predict import AnyForecast

__all__ = ["EXAMPLES", "predict", "predictions"]

EXAMPLES = (
    "bhpeft predict runs/reviews new.csv --flag 10%",
    "bhpeft predict runs/reviews new.jsonl --flag 5% --by epistemic --out for-review.csv",
)
_SUFFIXES = (".csv", ".jsonl")
_WIDTH = 60  # of a text in the table


def predict(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    flag: Annotated[
        str, typer.Option(help="Flag this share of the rows, the least certain.", metavar="SHARE")
    ] = "10%",
    by: Annotated[
        str,
        typer.Option(
            help="Rank by total, epistemic or aleatoric uncertainty; classes also by variance "
            "or confidence.",
        ),
    ] = "total",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file for the predictions.",
            show_default="DATA-predictions, beside DATA",
        ),
    ] = None,
    show: Annotated[int, typer.Option(help="Rows of the table on the screen.", min=0)] = 5,
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out if it exists.")
    ] = False,
) -> None:
    """Predict new text, and flag what the posterior is least certain about.

    The file written has the data's columns, and prediction, probability, epistemic and aleatoric
    uncertainty (nats), flagged; for ratings prediction, sd, ends of the 90 % interval, epistemic
    and aleatoric variance, flagged.
    """
    from ..forecast import ClassForecast, RatingForecast
    from ..posterior.io import write
    from .runs import open_run, read_table, rows_for

    share = options.fraction(flag, "--flag")
    if share == 0:
        raise ConfigError(f"--flag: {flag} flags no row; expected a share above 0")
    out = out or _beside(data)
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"--out: {out} should end in {' or '.join(_SUFFIXES)}")
    if out.resolve() == Path(data).resolve():
        raise ConfigError(f"--out: {out} is the data itself")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} is there already; --overwrite replaces it")
    posterior = open_run(run, backbone, device)
    kind = RatingForecast if posterior.model.likelihood.kind == "rating" else ClassForecast
    if by not in kind.measures:
        raise ConfigError(f"--by: unknown {by!r}; expected one of {', '.join(kind.measures)}")
    rows = rows_for(posterior, data, labelled=False)
    examples = posterior.model.encode_texts(rows, posterior.columns)
    forecast = posterior.predict(examples, samples, seed=draw_seed)
    flagged = forecast.flag(share, by).tolist()
    found = predictions(forecast, flagged)
    written = read_table(data, None)  # as they are in the file, not as they were read
    write(out, _encoded(written, found, out.suffix))
    say(f"{len(rows)} rows, {len(flagged)} flagged by {by}; written to {out}")
    names = list(found)[:-1]
    order = forecast.flag(1.0, by)[:show].tolist()
    if order:
        texts = forecast.texts or [""] * len(rows)
        table(
            f"Least certain ({by}); rows count from 0",
            ("row", *names, "text"),
            [(i, *(found[name][i] for name in names), _short(texts[i])) for i in order],
        )


def predictions(forecast: AnyForecast, flagged: list[int]) -> dict[str, list[Any]]:
    """The columns that `predict` adds to a table."""
    from ..forecast import ClassForecast, RatingForecast

    columns: dict[str, list[Any]] = {}
    if isinstance(forecast, ClassForecast):
        columns["prediction"] = forecast.predicted
        columns["probability"] = _digits(forecast.confidence)
    else:
        assert isinstance(forecast, RatingForecast)
        lower, upper = forecast.interval(0.9)
        columns["prediction"] = _digits(forecast.mean)
        columns["sd"] = _digits(forecast.sd)
        columns |= {"lower_90": _digits(lower), "upper_90": _digits(upper)}
    columns["epistemic"] = _digits(forecast.epistemic)
    columns["aleatoric"] = _digits(forecast.aleatoric)
    chosen = set(flagged)
    columns["flagged"] = [i in chosen for i in range(len(forecast))]
    return columns


def _digits(values: Any) -> list[float]:
    """As many digits as float32 has."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def _beside(data: str) -> Path:
    path = Path(data)
    if not path.is_file():  # from the hub
        return Path("predictions.csv")
    suffix = ".csv" if path.suffix.lower() == ".csv" else ".jsonl"
    return path.with_name(f"{path.stem}-predictions{suffix}")


def _encoded(rows: Dataset, found: dict[str, list[Any]], suffix: str) -> bytes:
    """The table with the columns found, which replace any of the same name."""
    records = [
        row | {name: values[i] for name, values in found.items()}
        for i, row in enumerate(rows.to_list())
    ]
    if suffix == ".jsonl":
        lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
        return "".join(f"{line}\n" for line in lines).encode()
    text = StringIO()
    # The writer leaves a bare carriage return unquoted, and readers end a row there.
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
    return text.getvalue().encode()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
