"""`bhpeft report`: a page on a posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options

__all__ = ["EXAMPLES", "report"]

EXAMPLES = (
    "bhpeft report runs/reviews test.csv --out report.html",
    "bhpeft report runs/reviews --out report.md",
)


def report(
    run: options.Run,
    data: Annotated[
        str | None,
        typer.Argument(help="Labelled data to test it on.", show_default="only the fit"),
    ] = None,
    config: options.Config = None,
    out: Annotated[
        Path, typer.Option(help="A .html file, self-contained, or a .md file with plots beside it.")
    ] = Path("report.html"),
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """A page on a posterior: each round's fit, the change it makes, metrics and plots."""
    from .page import TEMPLATES, write_page
    from .runs import open_run

    if out.suffix not in TEMPLATES:
        raise ConfigError(f"--out: {out} should end in {' or '.join(TEMPLATES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    write_page(open_run(run, backbone, device), run, data, out, samples, draw_seed)
