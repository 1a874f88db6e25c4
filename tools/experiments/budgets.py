"""How much is done: a setting for two cores, and a toy one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bhpeft_pyro.data import Columns
from bhpeft_pyro.model.likelihoods import Categorical, HeteroscedasticNormal, MultipleChoice, Normal

from .tasks import Shift, Task

__all__ = ["BUDGETS", "Budget"]


@dataclass(frozen=True)
class Budget:
    """A setting of all experiments.

    Attributes:
        backbone: the frozen transformer.
        tasks: by name.
        plan: the tasks of each experiment.
        rows: training rows.
        more_rows: the training rows of the experiment that varies them.
        validation: rows to choose by, for every method the same.
        test: rows of each test.
        steps: optimiser steps of a fit, at most; the batch size is `FitOptions`'.
        samples: draws of a Bayesian forecast.
        members: of an ensemble.
        search: settings that are tried for each method.
        seeds: splits and starts.
        fitted: examples and tokens of a step of a fit whose cost is measured, and its steps.
        predicted: rows of files whose prediction is measured.
    """

    backbone: str
    tasks: Mapping[str, Task]
    plan: Mapping[str, tuple[str, ...]]
    rows: int
    more_rows: tuple[int, ...]
    validation: int
    test: int
    steps: int
    samples: int = 16
    members: int = 5
    search: int = 2
    seeds: int = 5
    fitted: tuple[int, int, int] = (16, 32, 10)
    predicted: tuple[int, ...] = (1000, 10_000)

    def setting(self) -> dict[str, int]:
        """What a result depends on besides its task, method, rows and seed."""
        names = ("validation", "test", "steps", "samples", "members", "search")
        return {name: getattr(self, name) for name in names}


_RATING = Columns(label="rating")
_SHIFTS = {
    f"to {name}": Shift(f"sentiment-{name}", labelled=True) for name in ("tweets", "amazon", "nyt")
}

# Sources by name. The treebank, whose sentences are of the same films, is none of its own.
_SOURCES = {
    "news": "news-agnews",
    "Reuters 1987": "news-reuters-1987",
    "tweets": "sentiment-tweets",
    "films": "sentiment-movies",
    "Amazon": "sentiment-amazon",
    "NYT": "sentiment-nyt",
}


def _among_others(own: str, task: Task) -> Task:
    """A task with rows of all other sources, and with rows of its own with typing errors."""
    others = {f"to {name}": Shift(file) for name, file in _SOURCES.items() if name != own}
    typos = {"to typing errors": Shift(_SOURCES[own], typos=True)}
    return replace(task, shifts={**task.shifts, **others, **typos})


_SMALL = {
    "news-agnews": Task("news-agnews", 4, Categorical),
    "sentiment-movies": Task(
        "sentiment-movies", 1, lambda: Normal(spread=2.0), _RATING, 48, shifts=_SHIFTS
    ),
    "sentiment-tweets": Task("sentiment-tweets", 1, lambda: Normal(spread=2.0), _RATING, 48),
    "sst, stars": Task("sentiment-sst-train", 5, Categorical, Columns(label="stars"), 48),
    "commonsense-openbookqa": Task("commonsense-openbookqa-train", 1, MultipleChoice),
    "commonsense-socialiqa": Task("commonsense-socialiqa", 1, MultipleChoice),
    "movies, noise by text": Task(
        "sentiment-movies", 2, lambda: HeteroscedasticNormal(spread=2.0), _RATING, 48
    ),
    "three topics": Task(
        "news-agnews",
        3,
        Categorical,
        classes=3,
        shifts={
            "to an unseen topic": Shift("news-agnews", label=3),
            "to Reuters 1987": Shift("news-reuters-1987"),
        },
    ),
}

_NOVELTY = {
    "news among others": _among_others("news", _SMALL["news-agnews"]),
    "films among others": _among_others("films", replace(_SMALL["sentiment-movies"], shifts={})),
    "tweets among others": _among_others("tweets", _SMALL["sentiment-tweets"]),
    "three topics among others": _among_others(
        "news",
        replace(
            _SMALL["three topics"], shifts={"to an unseen topic": Shift("news-agnews", label=3)}
        ),
    ),
    "weekly news among others": _among_others(
        "Reuters 1987",
        Task("news-reuters-1987", 8, Categorical, Columns(label="label_name")),
    ),
}

_TINY = {
    "classes": Task("tiny-classes", 3, Categorical, max_length=32),
    "ratings": Task("tiny-ratings", 2, lambda: HeteroscedasticNormal(spread=2.0), _RATING, 32),
    "choices": Task("tiny-choices", 1, MultipleChoice, max_length=32),
    "two classes": Task(
        "tiny-classes",
        2,
        Categorical,
        classes=2,
        max_length=32,
        shifts={"to the third": Shift("tiny-classes", label=2)},
    ),
}

_EVERYWHERE = ("tasks", "promise", "sets", "passes")
"""Questions to the same tasks."""
_FIVE = (
    *("news-agnews", "sentiment-movies", "sentiment-tweets"),
    *("commonsense-openbookqa", "commonsense-socialiqa"),
)

BUDGETS = {
    "small": Budget(
        backbone="minilm",
        tasks=_SMALL | _NOVELTY,
        plan=dict.fromkeys(_EVERYWHERE, _FIVE)
        | {
            "novelty": tuple(_NOVELTY),
            "rows": ("news-agnews", "sentiment-movies"),
            "labels": ("news-agnews", "sst, stars", "sentiment-tweets"),
        },
        rows=400,
        more_rows=(100, 400, 2000),
        validation=100,
        test=400,
        steps=300,
    ),
    "tiny": Budget(
        backbone="tiny",
        tasks=_TINY,
        plan=dict.fromkeys(_EVERYWHERE, ("classes", "ratings", "choices"))
        | {
            "novelty": ("two classes",),
            "rows": ("classes",),
            "labels": ("classes", "ratings", "choices"),
        },
        rows=48,
        more_rows=(24, 48),
        validation=24,
        test=48,
        steps=4,
        samples=4,
        members=2,
        seeds=2,
        fitted=(8, 6, 2),
        predicted=(50, 100),
    ),
}
"""The settings, by name."""
