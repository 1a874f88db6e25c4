"""`bhpeft history`: the rounds of a saved posterior, or of a folder of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, SaveError
from . import options
from .screen import print_json, say, table

_FACTS = (
    *("id", "name", "examples", "temperature", "keep", "negative_elbo"),
    *("parent", "data", "projection", "metrics"),
)
_SHOWN = ("id", "parent", "name", "examples", "keep")


def history(
    folder: Annotated[
        Path, typer.Argument(help="A saved posterior, a stream, or a folder of saved posteriors.")
    ],
    keep: Annotated[
        str | None,
        typer.Option(
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
    if keep is not None:
        if single:
            raise ConfigError(f"--keep: {folder} is a posterior; expected a folder of rounds")
        for path in history.keep_only(keep):
            say(f"moved to {path}")
    rounds = saving.read_lineage(folder) if single else tuple(history.rounds.values())
    if not rounds:
        raise SaveError(f"folder: no saved posterior and no rounds in {folder}")
    folders = {rounds[-1].id: folder} if single else history.folders
    labels = {id: Tally.of(path, id) for id, path in folders.items()}
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
    columns = {name: [getattr(report, name) for report in rounds] for name in _SHOWN}
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
