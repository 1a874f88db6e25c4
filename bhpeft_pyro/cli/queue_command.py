"""`bhpeft queue`: which texts to label next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import BHPEFTError, ConfigError
from . import options
from .screen import command, say, table

if TYPE_CHECKING:
    from ..decisions.queue import By, Queue

_SHOWN = 5  # rows on the screen


def queue(
    run: Annotated[
        str,
        typer.Argument(
            help="The folder of a saved posterior or a stream; before the first fit, the name of "
            "a backbone, such as minilm.",
            show_default=False,
        ),
    ],
    data: options.Data,
    config: options.Config = None,
    n: Annotated[int, typer.Option("--n", help="How many texts.", min=1)] = 20,
    by: Annotated[
        Literal["information", "typical", "random"] | None,
        typer.Option(
            help="information: the texts whose labels, together, say most about the labels of all "
            "texts. typical: texts that are like many others. random: texts at random.",
            show_default="information; typical before the first fit",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The .csv or .jsonl file to write.")] = Path(
        "queue.csv"
    ),
    text_column: options.TextColumn = None,
    seed: Annotated[int, typer.Option(help="The same seed chooses the same texts.")] = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    overwrite: options.OverwriteFile = False,
) -> None:
    """Choose the texts to label next, the most useful first, with a reason for each.

    The file has the columns of the data, an empty one for the label, and the reason. Fill in the
    labels, and give the file to bhpeft update. Texts that have been learnt are left out, and copies
    come once.

    Examples:
        bhpeft queue runs/reviews unlabelled.csv --n 20 --out queue.csv
        bhpeft queue minilm unlabelled.csv --n 50 --out first.csv
    """
    from ..data import Columns
    from ..data.cells import write_rows
    from ..data.sources import in_file, places, records
    from .saved import check_file, open_run, reading
    from .tables import rows_for

    check_file(out, ".csv", ".jsonl", data=data, overwrite=overwrite)
    if not Path(run).is_dir() or Path(run, "config.json").exists():  # it names a backbone
        chosen = _first(run, data, n, by or "typical", text_column, seed, device)
        label = Columns().label
        following = command("fit", out, "--backbone", run, "--out", "RUN")
    else:
        posterior = reading(open_run(Path(run), backbone, device), text_column)
        rows = rows_for(posterior, data, labelled=False)
        with in_file(data):
            chosen = posterior.queue(rows, n, by=by or "information", seed=seed)
        label = posterior.columns.target(posterior.model.likelihood.kind)
        following = command("update", run, out, "--out", "RUN")
    if text_column is not None:
        following += f" --text-column {shlex.quote(text_column)}"
    reasons = dict(zip(chosen.rows.tolist(), chosen.reasons, strict=True))
    given = records(data)
    why = "reason"
    while why in (*given[0], label):  # no column of the data is replaced
        why = f"queue_{why}"
    written = [given[row] | {label: None, why: each} for row, each in reasons.items()]
    write_rows(out, written, written[0])
    _, unit, number = places(data)
    say(
        f"{len(chosen)} of {len(given)} texts, by {chosen.by}; left out: {chosen.learnt} learnt, "
        f"{chosen.copies} copies; written to {out}"
    )
    say(f"next: fill in its column {label!r}, then: {following}")
    lines = [
        [number(row), reason, " ".join(text.split())]
        for (row, reason), text in zip(reasons.items(), chosen.texts, strict=True)
    ]
    table("To label first", [unit, "reason", "text"], lines[:_SHOWN])


def _first(
    name: str, data: str, n: int, by: By, text_column: str | None, seed: int, device: str
) -> Queue:
    """Texts to label before there is a posterior."""
    from ..data import Columns
    from ..data.sources import in_file, load
    from ..decisions.queue import first_to_label
    from ..model.backbone import load_backbone
    from ..model.tasks import categories

    try:
        backbone, tokenizer = load_backbone(name, device)
    except BHPEFTError as error:
        raise ConfigError(
            f"run: {name!r} is neither the folder of a posterior nor a backbone: {error}"
        ) from error
    model = categories(backbone, 2, kinds=(), tokenizer=tokenizer)
    columns = Columns() if text_column is None else Columns(text=text_column)
    rows = load(data, [columns.text])
    with in_file(data):
        return first_to_label(model, rows, n, by=by, columns=columns, seed=seed)
