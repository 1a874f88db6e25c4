"""Metrics on the screen and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..data import Examples
from ..posterior import Posterior
from .screen import print_json, table

__all__ = ["WORDS", "conclude", "show"]

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
