"""The experiments by name: what is compared, and what is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from . import canary, plots, scores
from .outcome import Outcome
from .scores import Score
from .tables import Table

__all__ = ["EXPERIMENTS", "REFERENCE", "Experiment"]

REFERENCE = "hybrid, deterministic"
"""What others are tested against."""


@dataclass(frozen=True)
class Experiment:
    """One question to the grid.

    Attributes:
        about: the question.
        methods: what is compared.
        scores: from a run to lines of tables.
        by: what the column is called that tells lines of one method apart; "" for none.
        draw: the plot of a table.
        check: raises an error if tables show what may not be.
    """

    about: str
    methods: tuple[str, ...]
    scores: Callable[[Outcome], list[Score]]
    by: str = ""
    draw: Callable[[Table], Figure] = plots.dots
    check: Callable[[Sequence[Table]], None] | None = None


_POINTS = tuple(
    f"{peft}, deterministic"
    for peft in ("head only", "adapter", "LoRA", "prefix", "MAM", "UniPELT", "hybrid")
)
_RIVALS = tuple(
    f"hybrid, {inference}"
    for inference in (
        "deterministic + scaling",
        "ensemble",
        "ensemble + scaling",
        "MC dropout",
        "MAP",
    )
)
_BAYESIAN = (
    "hybrid, one component",
    *(
        f"hybrid, Bayesian{variant}"
        for variant in ("", " (mean-field)", " (down only)", " (A only)")
    ),
)
_UNIONS = (
    "head only",
    "adapter",
    "LoRA",
    "prefix",
    "LoRA + adapter",
    "LoRA + prefix",
    "adapter + prefix",
    "MAM",
    "UniPELT",
    "hybrid",
)
_FEW = (
    REFERENCE,
    f"{REFERENCE} + scaling",
    "hybrid, ensemble",
    "hybrid, one component",
    "hybrid, Bayesian",
)

EXPERIMENTS = {
    "tasks": Experiment(
        "How good is each method?", (*_POINTS, *_RIVALS, *_BAYESIAN), scores.quality
    ),
    "ablation": Experiment(
        "What does each PEFT kind add, with and without Bayes?",
        tuple(f"{peft}, {way}" for peft in _UNIONS for way in ("deterministic", "Bayesian")),
        scores.quality,
    ),
    "uncertainty": Experiment(
        "Is it unsure where it is wrong?",
        (REFERENCE, *_RIVALS, *_BAYESIAN),
        scores.uncertainty,
        by="least certain by",
        draw=plots.profiles,
    ),
    "shift": Experiment(
        "Does it know texts of another kind?", (REFERENCE, *_RIVALS, *_BAYESIAN), scores.shift
    ),
    "rows": Experiment("How many rows does it take?", _FEW, scores.by_rows, "rows", plots.curves),
    "samples": Experiment(
        "How many draws does a forecast take?",
        ("hybrid, MC dropout", *_BAYESIAN[2:]),
        scores.by_samples,
        by="draws",
        draw=plots.curves,
    ),
    "canary": Experiment(
        "Does any method see the test's labels? Here nobody else can be right.",
        (*_POINTS, *(each for each in _RIVALS if "scaling" not in each), *_BAYESIAN),
        canary.canary,
        check=canary.check,
    ),
}
"""What `python -m tools.experiments` knows besides "cost"."""
