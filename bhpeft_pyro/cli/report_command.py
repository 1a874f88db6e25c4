"""`bhpeft report`: a page about a posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .screen import say


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
    from ..data.sources import in_file
    from ..plots.html import posterior_page
    from .runs import check_file, check_samples, guide_of, open_run, rows_for

    check_file(out, ".html")
    posterior = open_run(run, backbone, device)
    check_samples(samples, guide_of(posterior), posterior.model.likelihood, data is not None)
    forecast, heading = None, ""
    if data is not None:
        with in_file(data):
            examples = posterior.encode(rows_for(posterior, data, labelled=True))
        forecast = posterior.predict(examples, samples, seed=draw_seed)
        heading = f"On {len(examples)} {examples.unit} of {data}"
    write(out, posterior_page(posterior, str(run), forecast, heading).encode())
    say(f"written to {out}")
