"""What the commands print: results to stdout, everything else to stderr.

Metrics on the screen and as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..data import Examples
    from ..posterior.posterior import Posterior

__all__ = [
    "WORDS",
    "bars",
    "conclude",
    "png",
    "print_json",
    "say",
    "show",
    "spoken_warnings",
    "table",
]


def say(text: str) -> None:
    """A line on stderr, as it is: square brackets in it are no markup, and it is not broken."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def bars() -> bool:
    """Whether progress bars make sense: not in a log file."""
    return sys.stderr.isatty()


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a file, which can then be written at once."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def print_json(value: Mapping[str, Any]) -> None:
    """JSON on stdout; what is not finite is null, as JSON has no other word for it."""
    typer.echo(json.dumps(_finite(value), indent=1))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> None:
    """A table on stdout, texts and the first `left` columns to the left, numbers to the right.

    What is None is shown as a dash.
    """
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        texts = i < left or any(isinstance(row[i], str) for row in rows)
        grid.add_column(column, justify="left" if texts else "right")
    for row in rows:
        grid.add_row(*map(_cell, row))
    Console().print(grid, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """This package's warnings become lines, those of others are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"bhpeft_pyro\.")
        warnings.showwarning = lambda message, *_args, **_more: say(f"note: {message}")
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


WORDS = {
    "accuracy": "share of right predictions; higher is better",
    "f1": "macro F1; higher is better",
    "nll": "negative log-likelihood, nats; lower is better",
    "brier": "Brier score, 0 to 2; lower is better",
    "ece": "calibration: mean |accuracy - confidence|; lower is better",
    "classwise_ece": "the same for each class's probability; lower is better",
    "mce": "the largest such gap; lower is better",
    "aurc": "area under risk against coverage; lower is better",
    "mutual_information": "mean epistemic uncertainty, nats",
    "mse": "mean squared error; lower is better",
    "mae": "mean absolute error; lower is better",
    "crps": "continuous ranked probability score; lower is better",
    "coverage_90": "share of labels in the 90 % interval; 0.9 is right",
}


def show(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """A table with a row for each metric, and a column for each posterior."""
    names = next(iter(columns.values()))
    rows = [(name, *(c[name] for c in columns.values()), WORDS.get(name, "")) for name in names]
    table(title, ("", *columns, ""), rows)


def conclude(
    posterior: Posterior,
    out: Path,
    held_out: Examples | None,
    samples: int | None,
    as_json: bool,
    before: Posterior | None = None,
) -> None:
    """Say how good a posterior saved in `out` is on held-out rows, and how good the last one was.

    Its report there notes the metrics.
    """
    columns = {} if before is None else {"before": before}
    columns["after" if before else "held out"] = posterior
    scores = {}
    if held_out is not None:
        scores = {name: each.evaluate(held_out, samples) for name, each in columns.items()}
        *_, own = scores.values()
        posterior.report.metrics |= {f"held_out/{name}": value for name, value in own.items()}
        posterior.save(out, overwrite=True)
        if not as_json:
            show(f"{len(held_out)} held-out rows", scores)
    if as_json:
        report = posterior.report
        print_json(
            {
                "round": len(posterior.lineage),
                "examples": report.examples,
                "steps": report.steps,
                "negative_elbo": report.negative_elbo,
                "temperature": report.temperature,
                "unsettled": report.unsettled,
                **{name.replace(" ", "_"): values for name, values in scores.items()},
            }
        )
