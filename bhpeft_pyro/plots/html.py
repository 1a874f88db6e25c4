"""Tables and plots in HTML, for notebooks and for the page that `bhpeft report` writes.

It needs nothing from elsewhere, and every text in it is escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import __version__
from ..base.fit_options import FitOptions
from ..diagnostics.changes import changes
from ..forecast import Forecast
from ..forecast.metrics import MEANINGS, evaluate
from ..model.model import Model
from ..peft.sites import Site
from ..posterior.posterior import Posterior
from ..training.report import FitReport
from . import change_forest, elbo_trace, epistemic_aleatoric, novelty, rejection, reliability

_LISTED = 10  # rows of a forecast
_TEXT, _LONG_TEXT = 100, 300  # characters of a text in a notebook, and in a page

_DRAWN = "Where nothing was learnt, a change is as large as one drawn from the prior."
_CENTRAL = "At the central weights, around which the network is linearised, of each component."

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
pre { white-space: pre-wrap; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem .2rem 0; vertical-align: top; }
th { border-bottom: 1px solid #888; }
figcaption { font-weight: 600; }
footer { margin-top: 3rem; color: #767676; }
"""


def posterior_page(posterior: Posterior, title: str, tested: Iterable[str] = ()) -> str:
    """A document about a posterior, with the sections of its tests (`tested_html`), if any."""
    parts = [f"<h1>{escape(title)}</h1>", table((), posterior.facts.items()), *tested]
    if posterior.model.network.kinds:
        by_branch = changes(posterior)
        height = 1.5 + max(map(len, by_branch.values())) * (0.15 + 0.12 * len(by_branch))
        parts += [
            "<h2>What the PEFT weights change</h2>",
            f"<p>{_CENTRAL if posterior.linear else _DRAWN}</p>",
            image("Change by layer", partial(change_forest, by_branch), height),
        ]
    for number, report in reversed([*enumerate(posterior.lineage, 1)]):
        parts += [f"<h2>Round {number}</h2>", report_html(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<footer>bhpeft_pyro {__version__}</footer>\n</body>\n</html>\n"
    )


def tested_html(forecast: Forecast, heading: str, row_number: Callable[[int], int]) -> str:
    """A section about a forecast of labelled rows: metrics, plots, and the least certain rows, with
    the `row_number` that each has in its file."""
    scores = [(name, value, MEANINGS[name]) for name, value in evaluate(forecast).items()]
    parts = [
        f"<h2>{escape(heading)}</h2>",
        table(("metric", "value", ""), scores),
        forecast_plots(forecast),
        "<h3>Least certain</h3>\n<p>Rows are numbered as in the file.</p>",
        least_certain(forecast, _LONG_TEXT, row_number),
    ]
    return "\n".join(parts)


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table, with numbers to the right; without names it has no head."""
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in names)
    lines = ([head] if names else []) + ["".join(map(_cell, row)) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _cell(value: object) -> str:
    if isinstance(value, list):  # several labels
        value = ", ".join(map(str, value))
    text = f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
    side = "right" if isinstance(value, int | float) else "left"
    return f'<td style="text-align:{side}">{escape(text)}</td>'


def image(caption: str, draw: Callable[..., Axes], height: float = 4.2) -> str:
    """A plot with its caption, as a PNG inside the text."""
    # Not by pyplot, which keeps a global list of figures and may open windows.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    draw(ax=figure.subplots())
    data, words = b64encode(png(figure)).decode(), escape(caption)
    return (
        '<figure style="display:inline-block; margin:0 1rem 1rem 0; vertical-align:top">'
        f"<figcaption>{words}</figcaption>"
        f'<img width="464" alt="{words}" src="data:image/png;base64,{data}"></figure>'
    )


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def sites_html(sites: Sequence[Site]) -> str:
    """A row for each site."""
    rows = [(site.name, site.sizes, site.numel, site.role, site.unit_range) for site in sites]
    return table(("site", "dims", "weights", "role", "unit"), rows)


def model_html(model: Model) -> str:
    """The parts of a model, and its sites."""
    facts = model.facts | {"prior": str(model.prior)}
    return table((), facts.items()) + sites_html(model.sites)


def posterior_html(posterior: Posterior) -> str:
    """The facts of a posterior, and the report of its last round."""
    facts = table((), posterior.facts.items())
    return facts + (report_html(posterior.report) if posterior.lineage else "")


def report_html(report: FitReport) -> str:
    """A report as it is printed, the options that were changed, and the trace of the fit."""
    defaults = vars(FitOptions()) | {"progress": report.options.progress}
    changed = [f"{k}={v}" for k, v in vars(report.options).items() if v != defaults[k]]
    options = ", ".join(changed) or "the defaults"
    text = (
        f"<pre>{escape(str(report))}</pre>"
        f"<p>{report.seconds:.0f} s. Options other than the defaults: {escape(options)}.</p>"
    )
    if not report.history:
        return text
    return text + image("Trace of the fit", partial(elbo_trace, report.history))


def forecast_html(forecast: Forecast) -> str:
    """A forecast as it is printed, its least certain examples, and its plots."""
    words = f"<pre>{escape(repr(forecast))}</pre><p>The least certain; rows count from 0:</p>"
    return words + least_certain(forecast, _TEXT) + forecast_plots(forecast)


def least_certain(forecast: Forecast, longest: int, row_number: Callable[[int], int] = int) -> str:
    """The ten least certain examples, with at most so many characters of their texts."""
    order = forecast.flag(1.0)[:_LISTED].tolist()
    columns = forecast.table().iloc[order].dropna(axis=1, how="all").to_dict("list")
    columns["row"] = [*map(row_number, order)]
    first, last = ("row", "label", "prediction"), ("text", "nearest")
    for name in columns.keys() & {*last}:
        columns[name] = [
            text if len(text) <= longest else f"{text[: longest - 3]}..." for text in columns[name]
        ]
    # Nor the probability of each of several labels, so that texts have room.
    between = [n for n in columns if n not in first + last and not isinstance(columns[n][0], dict)]
    names = [name for name in (*first, *between, *last) if name in columns]
    return table(names, zip(*(columns[name] for name in names), strict=True))


def forecast_plots(forecast: Forecast) -> str:
    """The plots of a forecast; without labels, of its uncertainty alone."""
    plots: dict[str, Callable[..., Axes]] = {}
    known, sure = forecast.labels is not None, "confidence" in forecast.measures
    if known and sure:
        plots["Reliability"] = reliability
    if known:  # ranked as for the metric AURC
        rejected = partial(rejection, by="confidence" if sure else "total")
        plots["Quality of the rest when the least certain are rejected"] = rejected
    plots["Epistemic and aleatoric uncertainty"] = epistemic_aleatoric
    if forecast.novelty is not None:
        plots["Unlike what was learnt"] = novelty
    return "\n".join(image(words, partial(draw, forecast)) for words, draw in plots.items())
