"""`bhpeft history`: the rounds of a saved posterior, or of a folder of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import SaveError
from . import options
from .screen import print_json, table

_COLUMNS = ("id", "name", "examples", "temperature", "keep", "negative_elbo")
_MORE = ("parent", "data", "projection", "metrics")


def history(
    folder: Annotated[
        Path,
        typer.Argument(help="A saved posterior, a stream, or a folder of saved posteriors."),
    ],
    as_json: options.Json = False,
) -> None:
    """Show what each round learnt: a list for one posterior, a tree for a folder of rounds.

    Examples:
        bhpeft history runs/reviews-2
        bhpeft history runs/stream --json
    """
    from ..posterior import io
    from .runs import rounds_of

    tree = rounds_of(folder)
    single = io.exists(folder)
    rounds = io.read_lineage(folder) if single else tuple(tree.rounds.values())
    if not rounds:
        raise SaveError(f"folder: no saved posterior and no rounds in {folder}")
    if as_json:
        folders = {rounds[-1].id: folder} if single else tree.folders
        facts = [
            {
                **{name: getattr(report, name) for name in (*_COLUMNS, *_MORE)},
                "folder": str(folders[report.id]) if report.id in folders else None,
            }
            for report in rounds
        ]
        print_json({"rounds": facts})
    elif single:
        cells = [[getattr(report, name) for name in _COLUMNS] for report in rounds]
        table("Rounds", _COLUMNS, cells)
    else:
        Console().print(tree)
