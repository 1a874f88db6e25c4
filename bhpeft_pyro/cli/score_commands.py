"""`bhpeft evaluate`, `report` and `compare`: how good posteriors are, in numbers and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import options
from .screen import print_json, say, show_metrics, table


def evaluate(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    method: options.Method = None,
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    text_column: options.TextColumn = None,
    encoding: options.Encoding = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure accuracy, NLL, calibration and more on labelled data.

    If some rows were learnt or held out, by their texts, the others are scored apart too.

    Examples:
        bhpeft evaluate runs/reviews test.csv
        bhpeft evaluate runs/reviews test.csv --json | jq .ece
    """
    from ..data.copies import new_among
    from ..forecast import metrics
    from ..forecast.base import way_in_words
    from . import saved, tables

    posterior = saved.open_run(run, backbone, device)
    reader = saved.reading(posterior, text_column)
    examples = reader.encode(tables.labelled_for(reader, data, encoding))
    new = new_among(examples, posterior.learnt_rows)
    known = posterior.replace(novelty=None)  # which no metric is about
    forecast = known.predict(examples, samples, method=method, seed=draw_seed)
    shown = {"value": metrics.evaluate(forecast)}
    learnt = len(examples) - len(new)
    if learnt and len(new):
        of_new = known.predict(examples.subset(new), samples, method=method, seed=draw_seed)
        shown = {"all": shown["value"], "new": metrics.evaluate(of_new)}
    if as_json:
        every, *apart = shown.values()
        more = {"new": {"examples": len(new), **apart[0]}} if apart else {}
        print_json({"examples": len(examples), "learnt": learnt, **every, **more})
    else:
        how = way_in_words(forecast.method, forecast.passes)
        what = f"{len(examples)} rows of {data}"
        what += f", {learnt} of them learnt or held out" * (learnt > 0)
        show_metrics(f"{what}; {how}", shown)


def report(
    run: options.Run,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Labelled data to test it on.", show_default="none", callback=options.check_data
        ),
    ] = None,
    config: options.Config = None,
    out: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("report.html"),
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    encoding: options.Encoding = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Write an HTML page: each round's fit, what the weights change, metrics and plots of a test.

    If some rows of the test were learnt or held out, by their texts, the others come first, apart.

    Examples:
        bhpeft report runs/reviews --out report.html
        bhpeft report runs/reviews test.csv --out report.html
    """
    from ..base.files import write
    from ..data.copies import new_among
    from ..plots.html import posterior_page, tested_html
    from . import saved, tables

    saved.check_file(out, ".html")
    posterior = saved.open_run(run, backbone, device)
    tested = []
    if data is not None:
        rows = tables.labelled_for(posterior, data, encoding)
        examples, number = posterior.encode(rows), rows.index.tolist().__getitem__
        new = new_among(examples, posterior.learnt_rows)
        what, learnt = f"rows of {data}", len(examples) - len(new)
        if learnt and len(new):
            of_new = posterior.predict(examples.subset(new), samples, seed=draw_seed)
            at = new.tolist()
            heading = f"On the {len(new)} new {what}"
            tested.append(tested_html(of_new, heading, lambda row: number(at[row])))
        heading = f"On {len(examples)} {what}" + f", {learnt} learnt or held out" * (learnt > 0)
        forecast = posterior.predict(examples, samples, seed=draw_seed)
        tested.append(tested_html(forecast, heading, number))
    page = posterior_page(posterior, str(run), tested)
    write(out, page.encode())
    say(f"written to {out}")


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
    from . import saved, tables

    how = FitOptions().change(**fitting.given)
    saved.check_out(out, overwrite=True)
    saved.check_inputs(out, ["table.csv"], data, test, validation)
    rows = tables.LabelledTable(data, reading)
    backbone, tokenizer = rows.backbone(device)
    model = rows.task.model(backbone, tokenizer, ())
    examples = rows.encode(model)
    parts: dict[str, Any] = {}
    for name, given in (("test", test), ("validation", validation)):
        examples, parts[name] = rows.split(model, examples, given, how.seed, f"--{name}")
        if parts[name] is None:
            raise ConfigError(f"--{name}: got 0; expected rows, which all methods need")
    test_rows = len(parts["test"])
    counts = f"{len(parts['validation'])} validation and {test_rows} test rows"
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
        what = f"{test_rows} test rows"
        title = f"{what}; diff.: NLL minus the hybrid's, with its 95 % interval"
        short = methods.rename(columns={"nll difference": "diff."})
        table(title, ("", *short.columns), [*short.itertuples(name=None)])
    say(result.verdict())
    say(f"saved in {out}: a posterior for each method, table.csv, plot.png")
