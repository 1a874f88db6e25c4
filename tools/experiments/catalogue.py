"""The experiments by name: what is compared, and what is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import decisions, scores
from .outcome import Outcome
from .scores import Score

__all__ = ["EXPERIMENTS", "REFERENCE", "Experiment"]

REFERENCE = "hybrid, deterministic"
"""What others are tested against."""


@dataclass(frozen=True)
class Experiment:
    """One question to the grid.

    Attributes:
        about: the question.
        methods: what is compared.
        scores: from a run to rows of tables.
        by: the name of the column that tells rows of one method apart; "" for none.
    """

    about: str
    methods: tuple[str, ...]
    scores: Callable[[Outcome], list[Score]]
    by: str = ""


def _all(peft: str, *inferences: str) -> tuple[str, ...]:
    return tuple(f"{peft}, {inference}" for inference in inferences)


_POINTS = tuple(
    f"{peft}, deterministic"
    for peft in ("head only", "adapter", "LoRA", "prefix", "MAM", "UniPELT", "hybrid")
)
_RIVALS = _all(
    "hybrid", "deterministic + scaling", "ensemble", "ensemble + scaling", "MC dropout", "MAP"
)
_BAYESIAN = _all("hybrid", "one component", "Bayesian", "Bayesian (mean-field)")
_PASSES = _all(
    "hybrid",
    "deterministic + scaling",
    "ensemble + scaling",
    "Bayesian",
    *(f"student of {texts} texts" for texts in (0, 500, 2000)),
)
_PROMISED = _all("hybrid", "Bayesian", "ensemble + scaling", "deterministic + scaling")
_NOVELTY = ("head only, deterministic", "hybrid, ensemble", "hybrid, Bayesian")
_FEW = _all(
    "hybrid", "deterministic", "deterministic + scaling", "ensemble", "one component", "Bayesian"
)

EXPERIMENTS = {
    "tasks": Experiment(
        "How good is each method?", (*_POINTS, *_RIVALS, *_BAYESIAN), scores.quality
    ),
    "promise": Experiment(
        "Is a promised error kept, and how much is answered?", _PROMISED, decisions.promise, "rows"
    ),
    "sets": Experiment(
        "Do sets and intervals have their coverage?", _PROMISED, decisions.sets, "rows"
    ),
    "novelty": Experiment(
        "Does it recognise what it has never seen?", _NOVELTY, decisions.novelty, "learnt"
    ),
    "passes": Experiment("What do fewer passes lose?", _PASSES, scores.passes),
    "rows": Experiment("How many rows does it take?", _FEW, scores.by_rows, "rows"),
}
"""What `python -m tools.experiments` knows besides "cost"."""
