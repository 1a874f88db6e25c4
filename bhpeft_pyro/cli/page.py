"""The page that `bhpeft report` writes: facts, rounds, metrics and plots of a posterior."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import __version__, plots
from ..changes import changes
from ..forecast import ClassForecast
from ..forecast.metrics import evaluate
from ..guides.guide import title
from ..inference.predict import AnyForecast
from ..inference.report import FitReport
from ..options import FitOptions
from ..posterior.io import write
from ..posterior.posterior import MixturePosterior, Posterior
from .predict import predictions
from .runs import rows_for
from .screen import WORDS, png, say

__all__ = ["TEMPLATES", "write_page"]

TEMPLATES = {".html": "report.html", ".md": "report.md"}
_UNCERTAIN = 10  # rows of the list of the least certain


def write_page(
    posterior: Posterior, run: Path, data: str | None, out: Path, samples: int | None, seed: int
) -> None:
    """Write it to a file, and say so; in Markdown with its plots beside it.

    Args:
        run: the folder of the posterior.
        data: labelled rows to test it on.
        out: a file whose suffix is in `TEMPLATES`.
        samples, seed: of the forecast.
    """
    pages = Environment(
        loader=PackageLoader("bhpeft_pyro.cli"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = _Pictures(out)
    pages.filters["picture"] = pictures
    text = pages.get_template(TEMPLATES[out.suffix]).render(
        run=str(run),
        version=__version__,
        facts=_facts(posterior),
        rounds=[_round(n, each) for n, each in enumerate(posterior.lineage, 1)],
        change=_of_posterior(posterior),
        test=None if data is None else _test(posterior, data, samples, seed),
    )
    pictures.write()
    if not pictures.inline:
        text = re.sub(r"\n{3,}", "\n\n", text)
    write(out, text.encode())
    say(f"written to {out}" + (f" and {pictures.folder}" if pictures.files else ""))


Plots = dict[str, bytes]
"""A caption, and the PNG."""


def _of_round(report: FitReport) -> Plots:
    """How the loss went."""
    if not report.history:
        return {}
    return {"ELBO trace": _png(lambda ax: plots.elbo_trace(report.history, ax))}


def _of_posterior(posterior: Posterior) -> Plots:
    """What the PEFT weights do."""
    if not posterior.model.network.kinds:
        return {}
    found = changes(posterior)
    rows = max(map(len, found.values()))
    height = 1.5 + rows * (0.15 + 0.12 * len(found))
    return {"Change by layer": _png(lambda ax: plots.change_forest(found, ax), height)}


def _of_forecast(forecast: AnyForecast) -> Plots:
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
        } | found
    return found


def _png(draw: Callable[[Axes], object], height: float = 4.2) -> bytes:
    # Not pyplot's: no window, no global list of figures, whatever the backend.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    draw(figure.subplots())
    return png(figure)


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
        for number, picture in enumerate(self.files, 1):
            write(self.folder / f"{number}.png", picture)


def _facts(posterior: Posterior) -> dict[str, str]:
    network = posterior.model.network
    weights = sum(site.numel for site in posterior.model.sites)
    names = posterior.columns.label_names
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
        "plots": _of_round(fitted),
    }


def _test(posterior: Posterior, data: str, samples: int | None, seed: int) -> dict[str, Any]:
    rows = rows_for(posterior, data, labelled=True)
    examples = posterior.encode(rows)
    forecast = posterior.predict(examples, samples, seed=seed)
    found = predictions(forecast, [])
    names = list(found)[:-1]
    labels = rows[posterior.columns.target(posterior.model.likelihood.kind)][:]
    order = forecast.flag(1.0)[:_UNCERTAIN].tolist()
    return {
        "data": data,
        "rows": len(rows),
        "draws": samples,
        "metrics": [
            (name, value, WORDS.get(name, "")) for name, value in evaluate(forecast).items()
        ],
        "plots": _of_forecast(forecast),
        "names": ["row", "label", *names, "text"],
        "uncertain": [
            [i, labels[i], *(found[name][i] for name in names), (forecast.texts or [""])[i]]
            for i in order
        ],
    }
