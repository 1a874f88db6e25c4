"""Components that share training steps: branches of one fit, or the ends of its cycles."""

from __future__ import annotations

import copy
from functools import partial

from bhpeft_pyro.posterior.posterior import Posterior

from .job import Fitted, Inference, Job

__all__ = ["sharing"]


def sharing(branches: bool) -> Inference:
    """As many components as the budget has members, in three tenths of their steps.

    A fit of half the steps of one component comes first. The learning rate of each later fit rises
    and falls as in a fit of its own, which moves it away from where it starts
    (Loshchilov and Hutter 2017).

    Args:
        branches: whether every component is a short fit from the end of the first one, with its own
            order of rows. Otherwise each starts at the end of the one before, and the first
            fit's end is a component too, as in a snapshot ensemble (Huang et al. 2017).
    """

    def infer(job: Job) -> Fitted:
        members, whole = job.budget.members, job.budget.steps
        trunk = _fit(job, None, 0, whole // 2)
        points = [] if branches else [trunk]
        others = members - len(points)
        each = max(1, (3 * members * whole // 10 - whole // 2) // others)
        for number in range(others):
            last = trunk if branches else points[-1]
            points.append(_fit(job, last, number + 1, each))
        mixture = Posterior.mixture(points)
        posterior = mixture.widen(job.train, validation=job.validation)
        reports = posterior.report.components
        facts = {
            "temperature": reports[0].temperature,
            "shared_steps": trunk.report.steps if branches else 0,
            "components": [
                {name: getattr(report, name) for name in ("steps", "tau", "output_scale")}
                for report in reports
            ],
        }
        return Fitted(partial(posterior.predict, method="exact"), posterior, facts)

    return infer


def _fit(job: Job, last: Posterior | None, number: int, steps: int) -> Posterior:
    """A point, from where another one ends if there is one."""
    model = job.model() if last is None else last.model
    guide = "delta" if last is None else copy.deepcopy(last.guide)
    # With a temperature that is given, the last state is kept.
    how = {"seed": job.seed + 1000 * number, "max_steps": steps, "temperature": 0.0}
    return job.fit(model, guide, validation=job.validation, **how)
