"""`bhpeft fit`: from labelled text to a saved posterior."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import fitting as library
from ..inference import FitOptions
from . import options, recipe
from .backbone import load_backbone
from .quality import conclude
from .runs import check_out, hold_out, read_table
from .screen import bars, say
from .task import infer, named

__all__ = ["EXAMPLES", "fit"]

EXAMPLES = (
    "bhpeft fit reviews.csv --backbone roberta-base --out runs/reviews",
    "bhpeft fit films.jsonl --text-column review --label-column stars --task ratings "
    "--out runs/films",
    "bhpeft fit --config fit.yaml --epochs 5",
)


@options.fitting()
def fit(
    context: typer.Context,
    data: options.Data,
    out: options.Out,
    backbone: recipe.NewBackbone = "roberta-base",
    config: options.Config = None,
    task: recipe.Task = None,
    text_column: recipe.TextColumn = None,
    pair_column: recipe.PairColumn = None,
    label_column: recipe.LabelColumn = None,
    preset: recipe.Preset = "bh_peft",
    guide: recipe.Guide = "linear",
    restarts: Annotated[
        int, typer.Option(help="Independent fits, which predict together as a mixture.")
    ] = 1,
    noise_by_text: recipe.NoiseByText = False,
    max_length: recipe.MaxLength = None,
    unlabelled: recipe.Unlabelled = None,
    validation: options.Validation = "10%",
    samples: options.Samples = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Fit a posterior to labelled text, and save it.

    The data has columns text and label (classes by name or number, or real-valued ratings), or
    question, choices and answer.
    """
    how = FitOptions(progress=bars()).change(**options.given(context))
    check_out(out, overwrite)
    kinds = recipe.kinds(preset)
    recipe.check_guide(guide)
    table = read_table(data)
    found = infer(table, task, text_column, label_column, pair_column)
    say(f"{len(table)} rows, {found}")
    table = named(table, found.columns.label, found.names)
    train, held_out = hold_out(table, validation, how.seed)
    if isinstance(held_out, str):
        held_out = named(read_table(held_out), found.columns.label, found.names)
    more = None if unlabelled is None else read_table(unlabelled)
    model = found.model(*load_backbone(backbone, device), kinds, noise_by_text)
    say(f"fitting {preset} on {backbone}, {model.network.device}, to {len(train)} rows")
    posterior = library.fit(
        model,
        guide,
        train,
        # Without patience nothing depends on it: it is looked at once, at the end.
        validation=held_out if how.patience else None,
        unlabelled=more,
        columns=found.columns,
        max_length=max_length,
        label_names=found.names,
        options=how,
        restarts=restarts,
    )
    posterior.save(out, overwrite)
    say(f"{posterior.report}\nsaved in {out}")
    conclude(posterior, held_out, samples, as_json)
