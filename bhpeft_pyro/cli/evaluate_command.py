"""`bhpeft evaluate` and `bhpeft report`: how good a posterior is, in numbers and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .screen import print_json, say, show_metrics


def evaluate(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    method: options.Method = None,
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    text_column: options.TextColumn = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure accuracy, NLL, calibration and more on labelled data.

    Examples:
        bhpeft evaluate runs/reviews test.csv
        bhpeft evaluate runs/reviews test.csv --json | jq .ece
    """
    from ..forecast import metrics
    from ..forecast.base import cost_in_words
    from .saved import check_method, open_run, reading
    from .tables import labelled_examples

    posterior = open_run(run, backbone, device)
    check_method(posterior, method, samples)
    examples = labelled_examples(reading(posterior, text_column), data)
    known = posterior.replace(novelty=None)  # which no metric is about
    forecast = known.predict(examples, samples, method=method, seed=draw_seed)
    scores = metrics.evaluate(forecast)
    if as_json:
        print_json({"examples": len(examples), **scores})
    else:
        how = cost_in_words(forecast.method, forecast.passes)
        show_metrics(f"{len(examples)} {examples.unit} of {data}; {how}", {"value": scores})


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
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Write an HTML page: each round's fit, what the weights change, metrics and plots of a test.

    Examples:
        bhpeft report runs/reviews --out report.html
        bhpeft report runs/reviews test.csv --out report.html
    """
    from ..base.files import write
    from ..plots.html import posterior_page
    from .saved import check_file, check_method, open_run
    from .tables import labelled_examples

    check_file(out, ".html")
    posterior = open_run(run, backbone, device)
    check_method(posterior, None, samples, data is not None)
    forecast, heading = None, ""
    if data is not None:
        examples = labelled_examples(posterior, data)
        forecast = posterior.predict(examples, samples, seed=draw_seed)
        heading = f"On {len(examples)} {examples.unit} of {data}"
    write(out, posterior_page(posterior, str(run), forecast, heading).encode())
    say(f"written to {out}")
