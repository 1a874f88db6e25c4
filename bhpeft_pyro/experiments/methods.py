"""What is compared: PEFT weights x ways to infer them, all through the public API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset

from ..errors import ConfigError
from ..forecast import ClassForecast, RatingForecast
from ..guides import GuideLike
from ..inference.predict import AnyForecast
from ..metrics import evaluate
from ..peft import Kind, presets
from ..posterior import Posterior
from .dropout import dropout
from .job import Fitted, Inference, Job
from .laplace import SCALES, LastLayer
from .zero_shot import zero_shot

__all__ = ["GUIDES", "INFERENCE", "PEFT", "Method", "method", "mixture"]

# The search of each method: as many settings for all of them, the first one the default.
_ADAM: tuple[dict[str, Any], ...] = ({"lr": 2e-3}, {"lr": 5e-4})
_NATURAL: tuple[dict[str, Any], ...] = ({}, {"natural_lr": 0.1})
_JOINT: tuple[dict[str, Any], ...] = ({}, {"joint_lr": 0.02})
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
        started = time.perf_counter()
        posterior = run(**setting)
        seconds = time.perf_counter() - started
        predict = _predict(posterior, samples)
        validation = predict(job.validation)
        nll = evaluate(validation)["nll"]
        tried.append({**setting, "nll": nll, "seconds": seconds, "steps": posterior.report.steps})
        report = posterior.report
        facts = {
            "chosen": dict(setting),
            "temperature": report.temperature,
            "unsettled": report.unsettled,
            "found": report.found,
        }
        found.append((nll, Fitted(predict, posterior, validation, facts)))
    best = min(found, key=lambda pair: pair[0])[1]
    best.facts["tried"] = tried
    return best


def _early(job: Job) -> dict[str, Any]:
    """Maximum likelihood, stopped early on the validation rows."""
    every = max(1, job.budget.steps // _CHECKS)
    return {
        "temperature": 0.0,
        "validation": job.validation,
        "eval_every": every,
        "patience": _PATIENCE,
    }


def deterministic(job: Job) -> Fitted:
    """Ordinary fine-tuning: a point."""

    def run(**setting: Any) -> Posterior:
        return job.fit(job.model(point=True), GUIDES["deterministic"], **_early(job), **setting)

    return _searched(job, _ADAM, 0, run)


def map_estimate(job: Job) -> Fitted:
    """The prior and the coordinates of the Bayesian fits, and a point in place of a posterior."""

    def run(**setting: Any) -> Posterior:
        return job.fit(job.model(point=False), "delta", **setting)

    return _searched(job, _ADAM, 0, run)


def mc_dropout(job: Job) -> Fitted:
    """Monte Carlo dropout (Gal and Ghahramani 2016), masks kept on to predict."""

    def run(**setting: Any) -> Posterior:
        model = job.model(point=True)
        # As many draws as examples: each has a mask of its own, as with dropout layers.
        many = {"batch_size": 16, "particles": 16, "eval_samples": 4}
        return job.fit(model, dropout(model), **_early(job), **many, **setting)

    return _searched(job, _ADAM, job.budget.samples, run)


def ensemble(job: Job) -> Fitted:
    """Points from several starts (Lakshminarayanan et al. 2017); the first one's is the search."""
    first = deterministic(job)
    members = [first.posterior]
    for number in range(1, job.budget.members):
        model, seed = job.model(point=True), 1000 * number + job.seed
        setting = {**_early(job), **first.facts["chosen"], "seed": seed}
        members.append(job.fit(model, "delta", **setting))

    def predict(rows: Dataset) -> AnyForecast:
        return mixture([_predict(member, 0)(rows) for member in members])

    facts = {**first.facts, "members": len(members)}
    return Fitted(predict, first.posterior, predict(job.validation), facts)


def laplace(job: Job) -> Fitted:
    """Last-layer Laplace around a point; one number more, the prior's scale, is searched."""
    fitted = deterministic(job)
    layer = LastLayer(fitted.posterior, job.train)
    found = {s: layer.predict(job.validation, s, job.budget.samples) for s in SCALES}
    best = min(SCALES, key=lambda scale: evaluate(found[scale])["nll"])
    predict = partial(layer.predict, scale=best, samples=job.budget.samples)
    return Fitted(predict, fitted.posterior, found[best], {**fitted.facts, "scale": best})


def bayesian(
    guide: GuideLike,
    temperature: float = 1.0,
    settings: Sequence[Mapping[str, Any]] = _NATURAL,
) -> Inference:
    """Variational inference to the end; no validation row is looked at but for the search."""

    def infer(job: Job) -> Fitted:
        def run(**setting: Any) -> Posterior:
            return job.fit(job.model(point=False), guide, temperature=temperature, **setting)

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
    "Bayesian": "linear",
    "Bayesian (mean-field)": "normal",
    "Bayesian (down only)": "down only",
    "Bayesian (A only)": "A only",
}
"""The guides of those that are one fit of a guide known by name."""

INFERENCE: dict[str, Inference] = {
    "deterministic": deterministic,
    "MC dropout": mc_dropout,
    "ensemble": ensemble,
    "last-layer Laplace": laplace,
    "MAP": map_estimate,
    "Bayesian": bayesian(GUIDES["Bayesian"], settings=_JOINT),
    "Bayesian (mean-field)": bayesian(GUIDES["Bayesian (mean-field)"]),
    "Bayesian (down only)": bayesian(GUIDES["Bayesian (down only)"]),
    "Bayesian (A only)": bayesian(GUIDES["Bayesian (A only)"]),
    "Bayesian (temperature 0.1)": bayesian(GUIDES["Bayesian"], 0.1, _JOINT),
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


def mixture(members: Sequence[AnyForecast]) -> AnyForecast:
    """The forecast of an ensemble, each member being a draw."""
    first = members[0]
    if isinstance(first, RatingForecast):
        return RatingForecast.from_draws(
            torch.cat([each.means for each in members if isinstance(each, RatingForecast)]),
            torch.cat([each.sds for each in members if isinstance(each, RatingForecast)]),
            labels=first.labels,
        )
    classes = [each for each in members if isinstance(each, ClassForecast)]
    return ClassForecast.from_draws(
        torch.stack([each.probabilities for each in classes]),
        labels=first.labels,
        choices=first.choices,
        keep_samples=True,
    )
