"""`bhpeft compare`: which way of fine-tuning suits a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import options
from .screen import print_json, say, table


def compare(
    data: options.Data,
    out: Annotated[
        Path, typer.Option(help="The folder of posteriors, table and plot.", show_default=False)
    ],
    reading: options.Reading,
    fitting: options.Fitting,
    config: options.Config = None,
    test: Annotated[
        Any, options.held_out("Rows to test on: a share of the data, or a file.")
    ] = "20%",
    validation: Annotated[
        Any,
        options.held_out(
            "Rows held out to stop the training and to choose temperatures, widths and output "
            "scales: a share of the data, or a file."
        ),
    ] = "20%",
    components: Annotated[
        int, typer.Option(help="Components of the ensemble, and of the posterior.", min=2)
    ] = 5,
    yes: options.Yes = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Fit a head, LoRA, the hybrid, an ensemble of hybrids and the posterior; compare forecasts.

    All are fitted to the same rows. Each fit is saved in --out, so a comparison that was killed
    continues when it is started again. The intervals are over test rows; another seed gives other
    numbers.

    Examples:
        bhpeft compare reviews.csv --backbone minilm --out runs/compared
        bhpeft compare train.jsonl --test test.jsonl --task ratings --out runs/compared
    """
    from .. import FitOptions
    from ..base.files import write
    from ..diagnostics.comparison import compare as run
    from ..plots.html import png
    from .saved import check_inputs, check_out
    from .tables import LabelledTable

    how = FitOptions().change(**fitting.given)
    check_out(out, overwrite=True)
    check_inputs(out, ["table.csv"], data, test, validation)
    rows = LabelledTable(data, reading, yes)
    backbone, tokenizer = rows.backbone(device)
    model = rows.task.model(backbone, tokenizer, ())
    examples = rows.encode(model)
    parts: dict[str, Any] = {}
    for name, given in (("test", test), ("validation", validation)):
        examples, parts[name] = rows.split(model, examples, given, how.seed, f"--{name}")
        if parts[name] is None:
            raise ConfigError(f"--{name}: got 0; expected rows, which all methods need")
    test_rows = len(parts["test"])
    counts = f"{len(parts['validation'])} validation and {test_rows} test {examples.unit}"
    say(f"{len(examples)} training, {counts}")
    result = run(
        lambda kinds: rows.task.model(backbone, tokenizer, kinds),
        examples,
        parts["validation"],
        parts["test"],
        out,
        components=components,
        options=how,
        say=say,
        columns=rows.task.columns,
    )
    methods = result.table()
    write(out / "table.csv", methods.to_csv().encode())
    write(out / "plot.png", png(result.plot()))
    methods = methods.astype(object).where(methods.notna(), None)
    if as_json:
        print_json({"test_rows": test_rows, "methods": methods.to_dict(orient="index")})
    else:
        what = f"{test_rows} test {examples.unit}"
        title = f"{what}; diff.: NLL minus the hybrid's, with its 95 % interval"
        short = methods.rename(columns={"nll difference": "diff."})
        table(title, ("", *short.columns), [*short.itertuples(name=None)])
    say(result.verdict())
    say(f"saved in {out}: a posterior for each method, table.csv, plot.png")
