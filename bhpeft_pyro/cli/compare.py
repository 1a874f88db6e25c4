"""`bhpeft compare`: which way of fine-tuning suits a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options
from .recipe import Recipe, options_of_recipe
from .screen import bars, png, print_json, say, table

__all__ = ["EXAMPLES", "compare"]

_DIFFERENCE = ("nll difference", "low", "high")

EXAMPLES = (
    "bhpeft compare reviews.csv --backbone minilm --out runs/compared",
    "bhpeft compare train.jsonl --test test.jsonl --task ratings --out runs/compared",
)


@options.fitting()
@options_of_recipe("guide", "preset", "unlabelled")
def compare(
    context: typer.Context,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(help="The folder of posteriors, table and plot.", show_default=False)
    ],
    recipe: Recipe,
    config: options.Config = None,
    test: Annotated[
        str, typer.Option(help="A file of test rows, or a share of the rows.", metavar="FILE|SHARE")
    ] = "20%",
    validation: options.Validation = "20%",
    components: Annotated[
        int, typer.Option(help="Of the ensemble, and of the posterior.", min=2)
    ] = 5,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Fit a head, LoRA, the hybrid, an ensemble of it and the posterior; compare their forecasts.

    All see the same rows. Each fit is saved in --out; killed and started again, it goes on. The
    intervals are over test rows; another seed gives other numbers.
    """
    from ..comparison import BASELINE
    from ..comparison import compare as run
    from ..options import FitOptions
    from ..posterior.io import write
    from .runs import hold_out, naming, read_table

    how = FitOptions(progress=bars()).change(**options.given(context))
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; expected a folder, or the name of a new one")
    rows = read_table(data)
    found = recipe.task_of(rows)
    say(f"{len(rows)} rows, {found}")
    first = recipe.model(found, device)
    columns = recipe.columns(found)
    examples = first.encode(rows, columns)
    parts = {}
    for name, given in (("test", test), ("validation", validation)):
        examples, part = hold_out(examples, given, how.seed, f"--{name}")
        if part is None:
            raise ConfigError(f"--{name}: expected rows; the methods need some")
        if isinstance(part, str):
            with naming(part, f"--{name}"):
                part = first.encode(read_table(part), columns)
        parts[name] = part
    say(f"{len(examples)} rows to learn, {', '.join(f'{len(p)} {n}' for n, p in parts.items())}")
    result = run(
        lambda kinds: found.model(
            first.network.backbone, first.network.tokenizer, kinds, recipe.noise_by_text
        ),
        examples,
        parts["validation"],
        parts["test"],
        out,
        columns=columns,
        components=components,
        options=how,
        say=say,
    )
    made = result.table()
    write(out / "table.csv", made.to_csv().encode())
    write(out / "plot.png", png(result.plot()))
    if as_json:
        print_json({"test_rows": len(parts["test"]), "methods": made.to_dict(orient="index")})
        return
    shown = [name for name in made.columns if name not in (*_DIFFERENCE, "seconds")]
    body = []
    for name, row in made.iterrows():
        away = "{:.3f} [{:.3f}, {:.3f}]".format(*row[[*_DIFFERENCE]])
        body.append((name, *row[shown], "-" if name == BASELINE else away, round(row["seconds"])))
    title = f"{len(parts['test'])} test rows; NLL less the hybrid's with its 95 % interval"
    table(title, ("", *shown, "nll - hybrid's", "seconds"), body)
    say(f"saved in {out}: a posterior for each method, table.csv, plot.png")
