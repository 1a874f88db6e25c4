"""The plots of a report, as PNG files in memory."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import __version__, plots
from ..changes import changes
from ..errors import ConfigError
from ..forecast import ClassForecast
from ..forecast.metrics import evaluate
from ..guides.blocks import title
from ..inference.options import FitOptions
from ..inference.predict import AnyForecast
from ..inference.report import FitReport
from ..posterior.io import write
from ..posterior.mixture import MixturePosterior
from ..posterior.posterior import Posterior
from . import options
from . import report as figures
from .predict import predictions
from .runs import open_run, rows_for
from .screen import WORDS, say

__all__ = [
    "EXAMPLES",
    "of_forecast",
    "of_posterior",
    "of_round",
    "report",
]


Plots = dict[str, bytes]
"""A caption, and the PNG."""


def of_round(report: FitReport) -> Plots:
    """How the loss went."""
    if not report.history:
        return {}
    return {"ELBO trace": _png(lambda ax: plots.elbo_trace(report.history, ax))}


def of_posterior(posterior: Posterior) -> Plots:
    """What the PEFT weights do."""
    if not posterior.model.network.kinds:
        return {}
    found = changes(posterior)
    rows = max(map(len, found.values()))
    height = 1.5 + rows * (0.15 + 0.12 * len(found))
    return {"Change by layer": _png(lambda ax: plots.change_forest(found, ax), height)}


def of_forecast(forecast: AnyForecast) -> Plots:
    """How good a labelled forecast is, and whether its uncertainty says so."""
    found = {
        "Quality of what is kept when the least certain are rejected": _png(
            lambda ax: plots.rejection(forecast, ax=ax)
        ),
        "Epistemic and aleatoric uncertainty": _png(
            lambda ax: plots.epistemic_aleatoric(forecast, ax=ax)
        ),
    }
    if isinstance(forecast, ClassForecast):
        found = {
            "Reliability": _png(lambda ax: plots.reliability(forecast, ax=ax)),
            "Uncertainty of right and wrong predictions": _png(
                lambda ax: plots.uncertainty_histogram(forecast, ax=ax)
            ),
        } | found
    return found


def _png(draw: Callable[[Axes], object], height: float = 4.2) -> bytes:
    # Not pyplot's: no window, no global list of figures, whatever the backend.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    draw(figure.subplots())
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


EXAMPLES = (
    "bhpeft report runs/reviews test.csv --out report.html",
    "bhpeft report runs/reviews --out report.md",
)
_TEMPLATES = {".html": "report.html", ".md": "report.md"}
_UNCERTAIN = 10  # rows of the list of the least certain


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
    if out.suffix not in _TEMPLATES:
        raise ConfigError(f"--out: {out} should end in {' or '.join(_TEMPLATES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    posterior = open_run(run, backbone, device)
    pages = Environment(
        loader=PackageLoader("bhpeft_pyro.cli"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = _Pictures(out)
    pages.filters["picture"] = pictures
    text = pages.get_template(_TEMPLATES[out.suffix]).render(
        run=str(run),
        version=__version__,
        facts=_facts(posterior),
        rounds=[_round(n, each) for n, each in enumerate(posterior.lineage, 1)],
        change=figures.of_posterior(posterior),
        test=None if data is None else _test(posterior, data, samples, draw_seed),
    )
    pictures.write()
    if not pictures.inline:
        text = re.sub(r"\n{3,}", "\n\n", text)
    write(out, text.encode())
    say(f"written to {out}" + (f" and {pictures.folder}" if pictures.files else ""))


class _Pictures:
    """From a PNG to what a page has for an address: the bytes themselves, or a file's name."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.stem}-plots")
        self.inline = out.suffix == ".html"
        self.files: list[bytes] = []

    def __call__(self, png: bytes) -> str:
        if self.inline:
            return f"data:image/png;base64,{b64encode(png).decode()}"
        self.files.append(png)
        return f"{self.folder.name}/{len(self.files)}.png"

    def write(self) -> None:
        if self.files:
            self.folder.mkdir(exist_ok=True)
        for number, png in enumerate(self.files, 1):
            write(self.folder / f"{number}.png", png)


def _facts(posterior: Posterior) -> dict[str, str]:
    network = posterior.model.network
    weights = sum(site.numel for site in posterior.model.sites)
    names = posterior.text.label_names
    return {
        "backbone": network.backbone.config._name_or_path or "unnamed",
        "PEFT": ", ".join(kind.name for kind in network.kinds) or "none: the head alone",
        "random weights": f"{weights:,}",
        "likelihood": str(posterior.model.likelihood),
        "guide": _guide(posterior),
        "rounds": str(len(posterior.lineage)),
    } | ({"classes": ", ".join(names)} if names else {})


def _guide(posterior: Posterior) -> str:
    if not isinstance(posterior, MixturePosterior):
        return title(posterior.guide)
    kind = title(posterior.components[0].guide)
    return f"{len(posterior.components)} components, {kind}"


def _round(number: int, fitted: FitReport) -> dict[str, Any]:
    defaults = asdict(FitOptions())
    changed = {
        name: value
        for name, value in asdict(fitted.options).items()
        if value != defaults[name] and name != "progress"
    }
    return {
        "number": number,
        "report": fitted,
        "options": ", ".join(f"{name}={value}" for name, value in changed.items())
        or "the defaults",
        "plots": figures.of_round(fitted),
    }


def _test(posterior: Posterior, data: str, samples: int | None, seed: int) -> dict[str, Any]:
    rows = rows_for(posterior, data, labelled=True)
    examples = posterior.text.encode(posterior.model, rows, labelled=True)
    forecast = posterior.predict(examples, samples, seed=seed)
    found = predictions(forecast, [])
    names = list(found)[:-1]
    labels = rows[posterior.text.columns.target(posterior.model.likelihood.kind)][:]
    order = forecast.flag(1.0)[:_UNCERTAIN].tolist()
    return {
        "data": data,
        "rows": len(rows),
        "draws": samples,
        "metrics": [
            (name, value, WORDS.get(name, "")) for name, value in evaluate(forecast).items()
        ],
        "plots": figures.of_forecast(forecast),
        "names": ["row", "label", *names, "text"],
        "uncertain": [
            [i, labels[i], *(found[name][i] for name in names), (forecast.texts or [""])[i]]
            for i in order
        ],
    }
