"""What is compared: PEFT weights x ways to infer them, all through the public API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast.metrics import evaluate
from bhpeft_pyro.guides import GuideLike
from bhpeft_pyro.inference.predict import AnyForecast
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft import Kind, presets
from bhpeft_pyro.posterior.posterior import MixturePosterior, Posterior

from .dropout import dropout
from .job import Fitted, Inference, Job
from .zero_shot import zero_shot

__all__ = ["GUIDES", "INFERENCE", "PEFT", "Method", "method"]

# The search of each method: as many settings for all of them, the first one the default.
_ADAM: tuple[dict[str, Any], ...] = ({"lr": 2e-3}, {"lr": 5e-4})
_NATURAL: tuple[dict[str, Any], ...] = ({}, {"lr": 0.1})
_FROZEN, _ZERO_SHOT = "frozen", "zero-shot"  # go together
_CHECKS, _PATIENCE = 10, 3  # points are looked at so often, and stopped early


def _predict(posterior: Posterior, samples: int) -> Callable[[Dataset], AnyForecast]:
    return partial(posterior.predict, samples=samples, keep_samples=True)


def _searched(
    job: Job, settings: Sequence[Mapping[str, Any]], samples: int, run: Callable[..., Posterior]
) -> Fitted:
    """The setting with the lowest NLL on the validation rows."""
    found: list[tuple[float, Fitted]] = []
    tried = []
    for setting in settings[: job.budget.search]:
        started = time.process_time()
        posterior = run(**setting)
        seconds = time.process_time() - started
        predict = _predict(posterior, samples)
        validation = predict(job.validation)
        nll = evaluate(validation)["nll"]
        tried.append({**setting, "nll": nll, "seconds": seconds, "steps": posterior.report.steps})
        report = posterior.report
        facts = {
            "chosen": dict(setting),
            "temperature": report.temperature,
            "unsettled": report.unsettled,
        }
        found.append((nll, Fitted(predict, posterior, validation, facts)))
    best = min(found, key=lambda pair: pair[0])[1]
    best.facts["tried"] = tried
    return best


@dataclass
class _Points:
    """Points that are fitted from starts of their own, which several methods share."""

    key: object = None
    model: Model | None = None
    fitted: list[Posterior] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def first(self, job: Job, count: int) -> tuple[list[Posterior], dict[str, Any]]:
        """The first points of a job, and what is to be known of them."""
        key = (job.load, job.task, tuple(job.kinds), job.train.to_dict(), job.seed, job.budget)
        if self.key != key or self.model is None:
            self.key, self.model, self.fitted = key, job.model(), []
            self.facts = self._search(job)
        while len(self.fitted) < count:
            self.fitted.append(self._fit(job, len(self.fitted), self.facts["chosen"]))
        return self.fitted[:count], dict(self.facts)

    def _fit(self, job: Job, number: int, setting: Mapping[str, Any]) -> Posterior:
        assert self.model is not None
        seed = job.seed + 1000 * number
        return job.fit(self.model, "delta", validation=job.validation, **{"seed": seed, **setting})

    def _search(self, job: Job) -> dict[str, Any]:
        tried = []
        for setting in _ADAM[: job.budget.search]:
            started = time.process_time()
            point = self._fit(job, 0, setting)
            seconds = time.process_time() - started
            nll = evaluate(point.predict(job.validation, 0))["nll"]
            tried.append({**setting, "nll": nll, "seconds": seconds, "steps": point.report.steps})
            if nll <= min(each["nll"] for each in tried):
                chosen, self.fitted = dict(setting), [point]
        return {"chosen": chosen, "tried": tried}


_POINTS = _Points()


def _of_points(count: Callable[[Job], int], wide: bool) -> Inference:
    """Points, as they are or each with its width.

    Args:
        count: how many.
        wide: whether each becomes a Laplace approximation.
    """

    def infer(job: Job) -> Fitted:
        points, facts = _POINTS.first(job, count(job))
        several = len(points) > 1
        posterior = (
            MixturePosterior.joined(points, points[0].report.options) if several else points[0]
        )
        if wide:
            started = time.process_time()
            posterior = posterior.widen(job.train, validation=job.validation)
            facts["seconds of widths"] = time.process_time() - started
        reports = posterior.report.components or [posterior.report]
        facts["temperature"] = reports[0].temperature
        facts["components"] = [
            {name: getattr(report, name) for name in _TOLD} for report in reports
        ]
        if wide:
            predict: Callable[[Dataset], AnyForecast] = posterior.predict
        else:
            predict = _predict(posterior, 0)
        return Fitted(predict, posterior, predict(job.validation), facts)

    return infer


_TOLD = ("steps", "best_step", "seconds", "tau", "noise", "point_nll", "component_nll")


def map_estimate(job: Job) -> Fitted:
    """One point under the prior, pulled by it and not stopped."""

    def run(**setting: Any) -> Posterior:
        return job.fit(job.model(), "delta", temperature=1.0, **setting)

    return _searched(job, _ADAM, 0, run)


def mc_dropout(job: Job) -> Fitted:
    """Monte Carlo dropout (Gal and Ghahramani 2016), masks kept on to predict."""

    def run(**setting: Any) -> Posterior:
        model = job.model()
        # As many draws as examples: each has a mask of its own, as with dropout layers.
        how = {"batch_size": 16, "particles": 16, "eval_samples": 4, "temperature": 0.0}
        every = max(1, job.budget.steps // _CHECKS)
        early = {"validation": job.validation, "eval_every": every, "patience": _PATIENCE}
        return job.fit(model, dropout(model), **how, **early, **setting)

    return _searched(job, _ADAM, job.budget.samples, run)


def bayesian(
    guide: GuideLike,
    temperature: float = 1.0,
    settings: Sequence[Mapping[str, Any]] = _NATURAL,
) -> Inference:
    """Variational inference to the end; no validation row is looked at but for the search."""

    def infer(job: Job) -> Fitted:
        def run(**setting: Any) -> Posterior:
            return job.fit(job.model(), guide, temperature=temperature, **setting)

        return _searched(job, settings, job.budget.samples, run)

    return infer


PEFT: dict[str, Callable[[], tuple[Kind, ...]]] = {
    "head only": presets.head_only,
    "adapter": presets.adapter,
    "LoRA": presets.lora,
    "prefix": presets.prefix,
    "LoRA + adapter": lambda: (*presets.lora(), *presets.adapter()),
    "LoRA + prefix": lambda: (*presets.lora(), *presets.prefix(10)),
    "adapter + prefix": lambda: (*presets.adapter(), *presets.prefix(10)),
    "MAM": presets.mam,
    "UniPELT": presets.unipelt,
    "hybrid": presets.bh_peft,
    _FROZEN: presets.head_only,
}
"""The PEFT weights."""

GUIDES = {
    "deterministic": "delta",
    "Bayesian": "laplace",
    "Bayesian (mean-field)": "normal",
    "Bayesian (down only)": "down only",
    "Bayesian (A only)": "A only",
}
"""The guides of those that are one fit of a guide known by name."""

INFERENCE: dict[str, Inference] = {
    "deterministic": _of_points(lambda job: 1, wide=False),
    "ensemble": _of_points(lambda job: job.budget.members, wide=False),
    "one component": _of_points(lambda job: 1, wide=True),
    "Bayesian": _of_points(lambda job: job.budget.members, wide=True),
    "MC dropout": mc_dropout,
    "MAP": map_estimate,
    "Bayesian (mean-field)": bayesian(GUIDES["Bayesian (mean-field)"]),
    "Bayesian (down only)": bayesian(GUIDES["Bayesian (down only)"]),
    "Bayesian (A only)": bayesian(GUIDES["Bayesian (A only)"]),
    _ZERO_SHOT: zero_shot,
}
"""The ways to infer them."""


@dataclass(frozen=True)
class Method:
    """PEFT weights, and how they are inferred; written as "hybrid, Bayesian".

    Attributes:
        peft: a name in `PEFT`.
        inference: a name in `INFERENCE`.
        scaled: with a temperature fitted to the validation rows: of the same run, not one more.
    """

    peft: str
    inference: str
    scaled: bool = False

    def __str__(self) -> str:
        return f"{self.peft}, {self.inference}{' + scaling' if self.scaled else ''}"


def method(name: str) -> Method:
    """A method by its name.

    Raises:
        ConfigError: there is no such method.

    >>> method("LoRA, deterministic + scaling")
    Method(peft='LoRA', inference='deterministic', scaled=True)
    """
    plain = name.removesuffix(" + scaling")
    peft, _, inference = plain.partition(", ")
    if peft not in PEFT or inference not in INFERENCE:
        raise ConfigError(
            f"method: {name!r} is unknown; expected one of {', '.join(PEFT)}, then one of "
            f"{', '.join(INFERENCE)}, as in 'hybrid, Bayesian'; and ' + scaling' if you like"
        )
    if (peft == _FROZEN) != (inference == _ZERO_SHOT):
        raise ConfigError(f"method: {name!r}: {_FROZEN!r} and {_ZERO_SHOT!r} go together")
    return Method(peft, inference, plain != name)
