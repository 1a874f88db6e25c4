"""The page that `bhpeft report` writes: facts, rounds, metrics and plots of a posterior."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import __version__, plots
from ..changes import changes
from ..forecast import ClassForecast
from ..forecast.metrics import evaluate
from ..guides.guide import title
from ..inference.report import FitReport
from ..options import FitOptions
from ..posterior.posterior import MixturePosterior, Posterior
from .predict import predictions, readable
from .runs import rows_for
from .screen import MEANINGS, png

_LISTED = 10  # rows of the list of the least certain

_OF_CLASSES: dict[str, Callable[..., Axes]] = {
    "Reliability": plots.reliability,
}
_OF_ALL: dict[str, Callable[..., Axes]] = {
    "Quality of the rest when the least certain are rejected": plots.rejection,
    "Epistemic and aleatoric uncertainty": plots.epistemic_aleatoric,
}


def page(posterior: Posterior, run: Path, data: str | None, samples: int | None, seed: int) -> str:
    """The page as self-contained HTML.

    Args:
        posterior: what it is about.
        run: the folder of the posterior.
        data: labelled rows to test it on.
        samples, seed: of the forecast.
    """
    templates = Environment(
        loader=PackageLoader("bhpeft_pyro.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html").render(
        run=str(run),
        version=__version__,
        facts=_facts(posterior),
        rounds=[_round(report) for report in posterior.lineage],
        change=_of_posterior(posterior),
        test=None if data is None else _test(posterior, data, samples, seed),
    )


def _facts(posterior: Posterior) -> dict[str, str]:
    network = posterior.model.network
    names = posterior.columns.label_names
    guide = title(posterior.guide)
    if isinstance(posterior, MixturePosterior):
        guide = f"{len(posterior.components)} x {title(posterior.components[0].guide)}"
    return {
        "backbone": network.backbone.config._name_or_path or "unnamed",
        "PEFT": ", ".join(kind.name for kind in network.kinds) or "none, only the head",
        "random weights": f"{sum(site.numel for site in posterior.model.sites):,}",
        "likelihood": str(posterior.model.likelihood),
        "guide": guide,
        "rounds": str(len(posterior.lineage)),
    } | ({"classes": ", ".join(names)} if names else {})


def _round(report: FitReport) -> dict[str, Any]:
    defaults = vars(FitOptions()) | {"progress": report.options.progress}
    changed = [f"{k}={v}" for k, v in vars(report.options).items() if v != defaults[k]]
    trace = {}
    if report.history:
        trace = {"ELBO trace": _image(partial(plots.elbo_trace, report.history))}
    return {"report": report, "options": ", ".join(changed) or "the defaults", "plots": trace}


def _of_posterior(posterior: Posterior) -> dict[str, str]:
    if not posterior.model.network.kinds:
        return {}
    found = changes(posterior)
    rows = max(map(len, found.values()))
    height = 1.5 + rows * (0.15 + 0.12 * len(found))
    return {"Change by layer": _image(partial(plots.change_forest, found), height)}


def _test(posterior: Posterior, data: str, samples: int | None, seed: int) -> dict[str, Any]:
    rows = rows_for(posterior, data, labelled=True)
    forecast = posterior.predict(posterior.encode(rows), samples, seed=seed)
    columns = readable(predictions(forecast))
    target = posterior.columns.target(posterior.model.likelihood.kind)
    labels = readable({target: rows[target][:]})[target]
    order = forecast.flag(1.0)[:_LISTED].tolist()
    metrics = evaluate(forecast).items()
    drawn = _OF_CLASSES | _OF_ALL if isinstance(forecast, ClassForecast) else _OF_ALL
    return {
        "data": data,
        "rows": len(rows),
        "metrics": [(name, value, MEANINGS.get(name, "")) for name, value in metrics],
        "plots": {caption: _image(partial(draw, forecast)) for caption, draw in drawn.items()},
        "names": ["row", "label", *columns, "text"],
        "uncertain": [
            [i, labels[i], *(values[i] for values in columns.values()), (forecast.texts or [""])[i]]
            for i in order
        ],
    }


def _image(draw: Callable[..., Axes], height: float = 4.2) -> str:
    # Not by pyplot, which keeps a global list of figures and may open windows.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    draw(ax=figure.subplots())
    return f"data:image/png;base64,{b64encode(png(figure)).decode()}"
