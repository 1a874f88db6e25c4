"""What is compared: PEFT weights x ways to infer them, all through the public API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import GuideLike
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft import Kind, presets
from bhpeft_pyro.posterior.posterior import Posterior

from .job import Fitted, Inference, Job
from .points import ADAM, by_student, of_points, search

__all__ = ["GUIDES", "INFERENCE", "PEFT", "Method", "dropout", "method", "upper_hybrid"]

# As many settings as of Adam, the first one the default.
_NATURAL: tuple[dict[str, Any], ...] = ({}, {"lr": 0.1})
_PATIENCE = 3  # evaluations of the validation rows, one an epoch, without a lower NLL


def _searched(
    job: Job, settings: Sequence[Mapping[str, Any]], samples: int, run: Callable[..., Posterior]
) -> Fitted:
    posterior, facts = search(job, settings, samples, run)
    report = posterior.report
    facts |= {"temperature": report.temperature, "falling": report.falling}
    return Fitted(partial(posterior.predict, samples=samples, keep_samples=True), posterior, facts)


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
        how = {"batch_size": 16, "particles": 16, "temperature": 0.0}
        early = {"validation": job.validation, "patience": _PATIENCE}
        model = job.model()
        return job.fit(model, dropout(model), **how, **early, **setting)

    return _searched(job, ADAM, job.budget.samples, run)


def bayesian(guide: GuideLike) -> Inference:
    """Variational inference to the end; the validation rows serve the search only."""

    def infer(job: Job) -> Fitted:
        def run(**setting: Any) -> Posterior:
            return job.fit(job.model(), guide, temperature=1.0, **setting)

        if guide == "delta":
            return _searched(job, ADAM, 0, run)
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
    "deterministic": of_points(ensemble=False, wide=False),
    "ensemble": of_points(ensemble=True, wide=False),
    "one component": of_points(ensemble=False, wide=True),
    "Bayesian": of_points(ensemble=True, wide=True),
    **{f"student of {texts} texts": by_student(texts) for texts in (0, 500, 2000)},
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
