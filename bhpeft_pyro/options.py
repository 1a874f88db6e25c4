"""Options of a fit, checked as soon as they are given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .checks import COUNT, SAMPLES, SEED, Number, Rule, boolean, check_fields, one_of
from .errors import ConfigError

__all__ = ["FitOptions"]

# Those that need nothing else than a number of steps.
_SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant", "inverse_sqrt")
_MAYBE_COUNT = Number(least=1, whole=True, none=True)
_MAYBE_POSITIVE = Number(above=0, none=True)
_START = Number(least=0, below=1)

_RULES: dict[str, Rule] = {
    "epochs": COUNT,
    "max_steps": _MAYBE_COUNT,
    "batch_size": COUNT,
    "particles": COUNT,
    "accumulate": COUNT,
    "lr": _MAYBE_POSITIVE,
    "schedule": one_of(*_SCHEDULES),
    "warmup": _START,
    "clip": _MAYBE_POSITIVE,
    "temperature": Number(least=0, none=True),
    "tau": _MAYBE_POSITIVE,
    "kl_warmup": _START,
    "patience": _MAYBE_COUNT,
    "eval_every": _MAYBE_COUNT,
    "eval_samples": SAMPLES,
    "bf16": boolean,
    "seed": SEED,
    "progress": boolean,
}


@dataclass(frozen=True)
class FitOptions:
    """How long, in what steps, and at what temperature to fit.

    Attributes:
        epochs: passes over the data, unless `max_steps` is given.
        max_steps: optimiser steps.
        batch_size: examples per forward pass, shared out over the particles.
        particles: weight draws per forward pass (1 for a point-mass guide).
        accumulate: forward passes per optimiser step.
        lr: step size. None takes each family's own: of "normal", B / N and at most 0.1 natural
            gradient (`NaturalGradient`); 2e-3 of Adam for everything else.
        schedule: of the learning rate: "cosine", "linear", "constant_with_warmup", "constant", or
            "inverse_sqrt", as in transformers.
        warmup: fraction of the steps over which the learning rate rises.
        clip: largest norm of the gradient of the loss per example; None for no clipping.
        temperature: weight of the KL. 1 is the posterior; 0 is maximum likelihood. Of points
            ("laplace", "delta") it is how strongly the prior pulls at them. None is 1; but points
            with held-out rows are not pulled, and these rows choose the step whose state is kept:
            the last of ten that are looked at, unless an earlier one is better by more than
            two standard errors. In later rounds None is 0.1 for them.
        tau: of "laplace": how much of the first prior's precision there is in the width, in
            multiples. None takes what gives held-out rows the highest density; without any that
            of the last round, or 1 in the first.
        kl_warmup: fraction of the steps over which the weight of the KL rises from 0.
        patience: with validation data, stop after so many evaluations without a lower NLL
            and go back to the best; None fits to the end and keeps the last. Points without a
            given temperature are not stopped.
        eval_every: steps between evaluations; None for once an epoch, or at the end of a shorter
            fit.
        eval_samples: weight draws of an evaluation.
        bf16: autocast to bfloat16.
        seed: of the draws and the order of the data.
        progress: show a progress bar.

    >>> FitOptions(particles=3, batch_size=8)
    Traceback (most recent call last):
        ...
    bhpeft_pyro.errors.ConfigError: batch_size=8 must be a multiple of particles=3: each weight \
draw gets an equal share of the batch (a point needs but one: particles=1)
    """

    epochs: int = 15
    max_steps: int | None = None
    batch_size: int = 16
    particles: int = 4
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float | None = None
    temperature: float | None = None
    tau: float | None = None
    kl_warmup: float = 0.0
    patience: int | None = None
    eval_every: int | None = None
    eval_samples: int = 8
    bf16: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if self.batch_size % self.particles:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of particles={self.particles}: "
                "each weight draw gets an equal share of the batch (a point needs but one: "
                "particles=1)"
            )

    def change(self, **changes: Any) -> FitOptions:
        """These options with some changed; an unknown name is an error that lists the known.

        `epochs` without `max_steps` puts an earlier `max_steps` out of force.
        """
        if unknown := changes.keys() - _RULES.keys():
            raise ConfigError(
                f"unknown fit options {', '.join(sorted(unknown))}; known: "
                f"{', '.join(sorted(_RULES))}"
            )
        if "epochs" in changes:
            changes = {"max_steps": None, **changes}
        return replace(self, **changes)
