"""Fine-tuned models from several starts, and what is made of them: an ensemble, Laplace
approximations, a student. Methods share them, so that each is fitted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from bhpeft_pyro.forecast.metrics import evaluate
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.prediction.predict import AnyForecast

from .job import Fitted, Inference, Job
from .machine import Step, in_turn, over

__all__ = ["ADAM", "by_student", "of_points", "search"]

ADAM: tuple[dict[str, Any], ...] = ({"lr": 2e-3}, {"lr": 5e-4})
"""The search of each method: as many settings for all of them, the first one the default."""
_REPORTED = (
    *("steps", "best_step", "seconds", "tau", "noise", "output_scale"),
    *("point_nll", "component_nll"),
)
_TURNS = 3  # of predictions whose time is compared


def search(
    job: Job, settings: Sequence[Mapping[str, Any]], samples: int, run: Callable[..., Posterior]
) -> tuple[Posterior, dict[str, Any]]:
    """The fit with the lowest NLL on the validation rows, and what was tried."""
    tried: list[dict[str, Any]] = []
    fits = []
    for setting in settings[: job.budget.search]:
        started = time.process_time()
        fits.append(run(**setting))
        seconds = time.process_time() - started
        nll = evaluate(fits[-1].predict(job.validation, samples))["nll"]
        tried.append({**setting, "nll": nll, "seconds": seconds, "steps": fits[-1].report.steps})
    best = min(range(len(fits)), key=lambda i: tried[i]["nll"])
    return fits[best], {"chosen": dict(settings[best]), "tried": tried}


@dataclass
class _Points:
    """Points that are fitted from different starts, which several methods share."""

    key: object = None
    model: Model | None = None
    fitted: list[Posterior] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    wide: Posterior | None = None  # all of them, each with its width
    students: dict[int, Posterior] = field(default_factory=dict)  # by their number of texts

    def first(self, job: Job, count: int) -> tuple[list[Posterior], dict[str, Any]]:
        """The first points of a job, and the facts of their search."""
        key = (job.load, job.task, tuple(job.kinds), job.train.to_dict(), job.seed, job.budget)
        if self.key != key:
            self.key, self.model = key, job.model()
            point, self.facts = search(job, ADAM, 0, partial(self._fit, job, 0))
            self.fitted, self.wide, self.students = [point], None, {}
        for number in range(len(self.fitted), count):
            self.fitted.append(self._fit(job, number, **self.facts["chosen"]))
        return self.fitted[:count], dict(self.facts)

    def _fit(self, job: Job, number: int, **setting: Any) -> Posterior:
        assert self.model is not None
        seed = job.seed + 1000 * number
        return job.fit(self.model, "delta", validation=job.validation, **{"seed": seed, **setting})


_POINTS = _Points()


def of_points(ensemble: bool, wide: bool) -> Inference:
    """Points, as they are or each with its width.

    Args:
        ensemble: as many as the budget has members; else one.
        wide: whether each becomes a Laplace approximation.
    """

    def infer(job: Job) -> Fitted:
        points, facts = _POINTS.first(job, job.budget.members if ensemble else 1)
        posterior = points[0]
        if len(points) > 1:
            posterior = Posterior.mixture(points)
        if wide:
            started = time.process_time()
            posterior = posterior.widen(job.train, validation=job.validation)
            facts["seconds of widths"] = time.process_time() - started
            if ensemble:
                _POINTS.wide = posterior
        how: dict[str, Any] = {"samples": 0, "keep_samples": True}
        how = {"method": "exact"} if wide else how
        facts |= _about(job, posterior, **how)
        return Fitted(partial(posterior.predict, **how), posterior, facts)

    return infer


def by_student(texts: int) -> Inference:
    """A student of the Laplace approximations of all points, from so many unlabelled texts; for 0
    from those of the training rows."""

    def infer(job: Job) -> Fitted:
        _, facts = _POINTS.first(job, job.budget.members)
        if _POINTS.wide is None:
            of_points(ensemble=True, wide=True)(job)
        assert _POINTS.wide is not None
        if texts not in _POINTS.students:
            some = job.unlabelled.select(range(min(texts, len(job.unlabelled))))
            if not texts:
                some = job.train.select_columns(list(job.task.inputs))
            started = time.process_time()
            student = _POINTS.wide.distill(some, seed=job.seed, progress=False)
            _POINTS.students[texts] = student
            facts["seconds of distillation"] = time.process_time() - started
        posterior = _POINTS.students[texts]
        assert posterior.student is not None
        facts["student"] = asdict(posterior.student.report)
        facts |= _about(job, posterior)
        return Fitted(posterior.predict, posterior, facts)

    return infer


def _about(job: Job, posterior: Posterior, **how: Any) -> dict[str, Any]:
    """Facts about what was fitted, and about the cost of its predictions: in passes, and in
    processor time over that of the first point. Novelty costs the same pass for all."""
    reports = posterior.report.components or [posterior.report]
    alone, rows = posterior.replace(novelty=None), job.validation
    point = _POINTS.fitted[0].replace(novelty=None)
    made: list[AnyForecast] = []
    runs: dict[str, Step] = {
        "this": lambda: made.append(alone.predict(rows, **how)),
        "point": lambda: point.predict(rows, samples=0),
    }
    seconds = in_turn(runs, _TURNS, time.process_time)
    return {
        "temperature": reports[0].temperature,
        "components": [{name: getattr(r, name) for name in _REPORTED} for r in reports],
        "passes": made[0].passes,
        "times one model": over(seconds["this"], seconds["point"]),
    }
