"""The page that `bhpeft report` writes: facts, rounds, metrics and plots of a posterior."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

from .. import __version__, html, plots
from ..changes import changes
from ..forecast.metrics import evaluate
from ..posterior.posterior import Posterior
from .runs import rows_for
from .screen import MEANINGS


def page(posterior: Posterior, run: Path, data: str | None, samples: int | None, seed: int) -> str:
    """The page as self-contained HTML.

    Args:
        posterior: what it is about.
        run: the folder of the posterior.
        data: labelled rows to test it on.
        samples, seed: of the forecast.
    """

    def body() -> Iterator[str]:
        yield html.table((), posterior.facts.items())
        if data is not None:
            yield from _test(posterior, data, samples, seed)
        if posterior.model.network.kinds:
            yield from _changes(posterior)
        for number, report in reversed([*enumerate(posterior.lineage, 1)]):
            yield f"<h2>Round {number}</h2>"
            yield html.report_html(report)
        yield f"<footer>bhpeft_pyro {__version__}</footer>"

    return html.page(str(run), body())


def _changes(posterior: Posterior) -> Iterator[str]:
    found = changes(posterior)
    rows = max(map(len, found.values()))
    height = 1.5 + rows * (0.15 + 0.12 * len(found))
    yield "<h2>What the PEFT weights change</h2>"
    yield "<p>Where nothing was learnt, a change is as large as one drawn from the prior.</p>"
    yield html.image("Change by layer", partial(plots.change_forest, found), height)


def _test(posterior: Posterior, data: str, samples: int | None, seed: int) -> Iterator[str]:
    rows = rows_for(posterior, data, labelled=True)
    forecast = posterior.predict(posterior.encode(rows), samples, seed=seed)
    metrics = evaluate(forecast).items()
    yield f"<h2>On {len(rows)} rows of {escape(data)}</h2>"
    yield html.table(
        ("metric", "value", ""),
        [(name, value, MEANINGS.get(name, "")) for name, value in metrics],
    )
    yield html.forecast_plots(forecast)
    yield "<h3>Least certain</h3>\n<p>Rows count from 0.</p>"
    yield html.least_certain(forecast)
