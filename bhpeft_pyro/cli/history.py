"""`bhpeft history`: the rounds of a saved posterior, or of a folder of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import SaveError
from . import options
from .screen import print_json, table

if TYPE_CHECKING:
    from ..inference.report import FitReport

__all__ = ["EXAMPLES", "history"]

EXAMPLES = (
    "bhpeft history runs/reviews-2",
    "bhpeft history runs/stream --json",
)

_COLUMNS = ("id", "name", "examples", "temperature", "keep", "negative_elbo")


def history(
    folder: Annotated[
        Path, typer.Argument(help="A saved posterior, or the folder of a stream or its rounds.")
    ],
    as_json: options.Json = False,
) -> None:
    """What each round learnt from: a list for one posterior, a tree for a folder of rounds."""
    from ..posterior import io
    from .runs import rounds_of

    tree = rounds_of(folder)
    single = io.exists(folder)
    rounds = io.read_lineage(folder) if single else tuple(tree.rounds.values())
    if not rounds:
        raise SaveError(f"folder: no saved posterior and no rounds in {folder}")
    folders = {rounds[-1].id: folder} if single else tree.folders
    facts = [_facts(report, folders.get(report.id)) for report in rounds]
    if as_json:
        print_json({"rounds": facts})
    elif single:
        table("Rounds", _COLUMNS, [[fact[name] for name in _COLUMNS] for fact in facts])
    else:
        Console().print(tree)


def _facts(report: FitReport, folder: Path | None) -> dict[str, object]:
    return {
        "id": report.id,
        "folder": None if folder is None else str(folder),
        "parent": report.parent,
        "name": report.name,
        "examples": report.examples,
        "data": report.data,
        "temperature": report.temperature,
        "keep": report.keep if isinstance(report.keep, float) else str(report.keep),
        "projection": report.projection,
        "negative_elbo": report.negative_elbo if report.history else float("nan"),
        "metrics": dict(report.metrics),
    }
