"""What is compared: PEFT weights x ways to infer them, all through the public API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast.metrics import evaluate
from bhpeft_pyro.guides import GuideLike
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft import Kind, presets
from bhpeft_pyro.posterior.mixture import MixturePosterior
from bhpeft_pyro.posterior.posterior import Posterior

from .job import Fitted, Inference, Job

__all__ = ["GUIDES", "INFERENCE", "PEFT", "Method", "dropout", "method", "upper_hybrid"]

# The search of each method: as many settings for all of them, the first one the default.
_ADAM: tuple[dict[str, Any], ...] = ({"lr": 2e-3}, {"lr": 5e-4})
_NATURAL: tuple[dict[str, Any], ...] = ({}, {"lr": 0.1})
_CHECKS, _PATIENCE = 10, 3  # evaluations of the validation rows with MC dropout; early stopping
_REPORTED = (
    *("steps", "best_step", "seconds", "tau", "noise", "output_scale"),
    *("point_nll", "component_nll"),
)


def _search(
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


def _searched(
    job: Job, settings: Sequence[Mapping[str, Any]], samples: int, run: Callable[..., Posterior]
) -> Fitted:
    posterior, facts = _search(job, settings, samples, run)
    report = posterior.report
    facts |= {"temperature": report.temperature, "unsettled": report.unsettled}
    return Fitted(partial(posterior.predict, samples=samples, keep_samples=True), posterior, facts)


@dataclass
class _Points:
    """Points that are fitted from different starts, which several methods share."""

    key: object = None
    model: Model | None = None
    fitted: list[Posterior] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def first(self, job: Job, count: int) -> tuple[list[Posterior], dict[str, Any]]:
        """The first points of a job, and the facts of their search."""
        key = (job.load, job.task, tuple(job.kinds), job.train.to_dict(), job.seed, job.budget)
        if self.key != key:
            self.key, self.model = key, job.model()
            point, self.facts = _search(job, _ADAM, 0, partial(self._fit, job, 0))
            self.fitted = [point]
        for number in range(len(self.fitted), count):
            self.fitted.append(self._fit(job, number, **self.facts["chosen"]))
        return self.fitted[:count], dict(self.facts)

    def _fit(self, job: Job, number: int, **setting: Any) -> Posterior:
        assert self.model is not None
        seed = job.seed + 1000 * number
        return job.fit(self.model, "delta", validation=job.validation, **{"seed": seed, **setting})


_POINTS = _Points()


def _of_points(ensemble: bool, wide: bool) -> Inference:
    """Points, as they are or each with its width.

    Args:
        ensemble: as many as the budget has members; else one.
        wide: whether each becomes a Laplace approximation.
    """

    def infer(job: Job) -> Fitted:
        points, facts = _POINTS.first(job, job.budget.members if ensemble else 1)
        posterior = points[0]
        if len(points) > 1:
            posterior = MixturePosterior.of_round(points, posterior.report.options)
        if wide:
            started = time.process_time()
            posterior = posterior.widen(job.train, validation=job.validation)
            facts["seconds of widths"] = time.process_time() - started
        reports = posterior.report.components or [posterior.report]
        facts["temperature"] = reports[0].temperature
        facts["components"] = [
            {name: getattr(report, name) for name in _REPORTED} for report in reports
        ]
        if wide:
            return Fitted(posterior.predict, posterior, facts)
        return Fitted(partial(posterior.predict, samples=0, keep_samples=True), posterior, facts)

    return infer


def dropout(model: Model, rate: float = 0.1) -> Callable[[Batch | None], None]:
    """A guide function that drops the inputs of each down-projection and of the head.

    Dropping an entry of an input is dropping a column of the weights that multiply it. What
    is kept is multiplied by 1 / (1 - rate), so the mean is the point.

    Args:
        model: the model.
        rate: the share that is dropped.
    """
    sites = model.sites

    def guide(batch: Batch | None = None) -> None:
        for site in sites:
            start = site.init().to(model.network.device)
            value = pyro.param(f"{site.name}.point", start)
            if site.dims[-1:] in (("in",), ("feature",)):
                shape = torch.Size((*[1] * (site.ndim - 1), site.shape[-1]))
                kept = dist.Bernoulli(value.new_tensor(1 - rate)).expand(shape).to_event(site.ndim)
                mask = pyro.sample(f"{site.name}.mask", kept, infer={"is_auxiliary": True})
                anchor = model.network.coordinates.anchor(site.name)
                at = torch.zeros_like(value) if anchor is None else anchor
                value = (at + value) * mask / (1 - rate) - at  # columns of the weights themselves
            pyro.sample(site.name, dist.Delta(value, event_dim=site.ndim))

    return guide


def mc_dropout(job: Job) -> Fitted:
    """Monte Carlo dropout (Gal and Ghahramani 2016): predictions draw masks as well."""

    def run(**setting: Any) -> Posterior:
        # As many draws as examples: each has its own mask, as with dropout layers.
        how = {"batch_size": 16, "particles": 16, "eval_samples": 4, "temperature": 0.0}
        every = max(1, job.budget.steps // _CHECKS)
        early = {"validation": job.validation, "eval_every": every, "patience": _PATIENCE}
        model = job.model()
        return job.fit(model, dropout(model), **how, **early, **setting)

    return _searched(job, _ADAM, job.budget.samples, run)


def bayesian(guide: GuideLike) -> Inference:
    """Variational inference to the end; the validation rows serve the search only."""

    def infer(job: Job) -> Fitted:
        def run(**setting: Any) -> Posterior:
            return job.fit(job.model(), guide, temperature=1.0, **setting)

        if guide == "delta":
            return _searched(job, _ADAM, 0, run)
        return _searched(job, _NATURAL, job.budget.samples, run)

    return infer


def upper_hybrid(count: int = 3) -> tuple[Kind, ...]:
    """The hybrid in the last `count` layers alone: half of MiniLM's."""
    layers = tuple(range(-count, 0))
    return tuple(replace(kind, layers=layers) for kind in presets.bh_peft())


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
    "upper hybrid": upper_hybrid,
}
"""The PEFT weights."""

GUIDES = {
    "deterministic": "delta",
    "Bayesian": "laplace",
    "Bayesian (mean-field)": "normal",
}
"""The guides of those that are one fit of a guide known by name."""

INFERENCE: dict[str, Inference] = {
    "deterministic": _of_points(ensemble=False, wide=False),
    "ensemble": _of_points(ensemble=True, wide=False),
    "one component": _of_points(ensemble=False, wide=True),
    "Bayesian": _of_points(ensemble=True, wide=True),
    "MC dropout": mc_dropout,
    "MAP": bayesian("delta"),
    **{name: bayesian(guide) for name, guide in GUIDES.items() if name.endswith(")")},
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
    return Method(peft, inference, plain != name)
