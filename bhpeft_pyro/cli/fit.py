"""`bhpeft fit`: from labelled text to a saved posterior."""

from __future__ import annotations

from pathlib import Path

import typer

from . import options
from .recipe import POINTS, Recipe, options_of_recipe
from .screen import bars, conclude, say

__all__ = ["EXAMPLES", "fit"]

EXAMPLES = (
    "bhpeft fit reviews.csv --backbone minilm --out runs/reviews",
    "bhpeft fit films.jsonl --text-column review --label-column stars --task ratings "
    "--out runs/films",
    "bhpeft fit --config fit.yaml --epochs 5",
)


@options.fitting()
@options_of_recipe()
def fit(
    context: typer.Context,
    data: options.Data,
    out: options.Out,
    recipe: Recipe,
    config: options.Config = None,
    components: options.Components = None,
    validation: options.Validation = "20%",
    samples: options.Samples = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Fit a posterior to labelled text, and save it.

    The data has columns text and label (classes by name or number, or real-valued ratings), or
    question, choices and answer.
    """
    from ..options import FitOptions
    from ..posterior.fit import fit as learn
    from .runs import check_out, hold_out, naming, read_table

    how = FitOptions(progress=bars()).change(**options.given(context))
    check_out(out, overwrite)
    table = read_table(data)
    found = recipe.task_of(table)
    say(f"{len(table)} rows, {found}")
    columns, unlabelled = recipe.columns(found), recipe.unlabelled_rows()
    model = recipe.model(found, device)
    # Before rows are held out, so that all are checked now, under the numbers the file has.
    examples = model.encode(table, columns)
    train, held_out = hold_out(examples, validation, how.seed)
    if isinstance(held_out, str):
        with naming(held_out):
            held_out = model.encode(read_table(held_out), columns)
    where = f"{recipe.backbone}, {model.network.device}"
    say(f"fitting {recipe.preset} on {where}, to {len(train)} rows")
    posterior = learn(
        model,
        recipe.guide,
        train,
        # Else nothing depends on it: it is looked at once, at the end.
        validation=held_out if how.patience or recipe.guide in POINTS else None,
        options=how,
        components=components,
        columns=columns,
        unlabelled=unlabelled,
    )
    posterior.report.name = Path(data).name
    posterior.report.given = examples.fingerprint
    posterior.save(out, overwrite)
    say(f"{posterior.report}\nsaved in {out}")
    conclude(posterior, out, held_out, samples, as_json)
