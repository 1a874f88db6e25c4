"""Options of a fit, checked when they are created."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError
from .checks import (
    COUNT,
    MAYBE_COUNT,
    MAYBE_POSITIVE,
    SAMPLES,
    SEED,
    Number,
    Rule,
    boolean,
    check_fields,
    shown,
)

_EPOCHS, _BRIEF = 15, 5  # of a fit, of a brief one
_LEAST_STEPS = 20  # of a brief one

_RULES: dict[str, Rule] = {
    "epochs": MAYBE_COUNT,
    "max_steps": MAYBE_COUNT,
    "batch_size": COUNT,
    "particles": COUNT,
    "accumulate": COUNT,
    "lr": MAYBE_POSITIVE,
    "clip": MAYBE_POSITIVE,
    "temperature": Number(least=0, none=True),
    "tau": Number(least=1e-5, most=1e5, none=True),  # float32 holds sums with what data say
    "patience": MAYBE_COUNT,
    "eval_every": MAYBE_COUNT,
    "eval_samples": SAMPLES,
    "bf16": boolean,
    "keep_texts": boolean,
    "seed": SEED,
    "progress": boolean,
}
_ELSEWHERE = {  # names of Hugging Face's for what `fit` takes
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "eval_dataset": "validation",
}


@dataclass(frozen=True)
class FitOptions:
    """How long to fit, in what steps, and at what temperature.

    Attributes:
        epochs: passes over the data, unless `max_steps` is given. None means 15. For a point
            estimate ("laplace", "delta") it means 5 (at least 20 steps) in later rounds, because
            longer training forgets earlier rounds, and in a first fit with held-out rows, unless
            these are 50 ratings or more, or only a head is trained. A later round of "laplace" on
            texts of another kind then ends half way between the last point estimate and where
            training ends (docs/updating.md), unless only a head is trained.
        max_steps: optimiser steps.
        batch_size: examples per forward pass, divided equally among the particles.
        particles: weight draws per forward pass; they divide `batch_size`. A point estimate always
            uses 1.
        accumulate: forward passes per optimiser step.
        lr: learning rate. None takes the default of the family: for "normal", natural-gradient
            steps (`NaturalGradient`) of B / N, at most 0.1; for point estimates ("laplace",
            "delta") Adam with 0.002, for all others Adam with 0.01. It rises over the first 5 % of
            the steps, and then falls to 0 along half a cosine.
        clip: largest norm of the gradient of the loss per example; None for no clipping.
        temperature: weight of the KL: 1 for the posterior, 0 for maximum likelihood. For point
            estimates ("laplace", "delta") it is the weight of the log prior density; in later
            rounds of "laplace", of the first prior in it, as the information of earlier data always
            has the weight 1. None means 1, except for point estimates with held-out rows, where
            it is 0 in `fit`. With 50 such rows or more (or if `epochs` or `max_steps` is given)
            their NLL is then evaluated ten times. The fit stops after three evaluations without a
            lower NLL, but fits of ratings always run to the end. The last state is kept unless an
            earlier one is better by more than two standard errors. None also means 0 in later
            rounds of "laplace" with 50 rows or more, if the prior is the last posterior under a
            known first prior.
        tau: for "laplace", the multiple of the first prior's precision in the covariance, 1e-5 to
            1e5. None takes the value with the highest density of held-out rows; without such rows
            that of the last round, or 1 in the first. With a number the noise scale of ratings
            stays that of the point estimate, and the output scale of classes is 1.
        patience: with validation data, stop after this many evaluations without a lower NLL and
            return to the best state; None fits to the end and keeps the last. It does not apply
            where held-out rows choose the state of a point estimate (`temperature`).
        eval_every: steps between evaluations. None for once an epoch, or at the end of a shorter
            fit; ten times where held-out rows choose the state of a point estimate.
        eval_samples: weight draws of an evaluation.
        bf16: autocast to bfloat16.
        keep_texts: keep the learnt texts with the posterior, up to 2,000 of all rounds, so that a
            forecast shows the `nearest` one, and a round with new labels needs no rows with earlier
            ones. They are in the files that are saved.
        seed: of the draws and of the order of the data.
        progress: show progress bars, in terminals and notebooks.

    Raises:
        ConfigError: a value is of the wrong type or outside its range.

    >>> FitOptions(particles=0)
    Traceback (most recent call last):
        ...
    bhpeft_pyro.errors.ConfigError: particles=0 must be an integer of at least 1
    """

    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 16
    particles: int = 4
    accumulate: int = 1
    lr: float | None = None
    clip: float | None = None
    temperature: float | None = None
    tau: float | None = None
    patience: int | None = None
    eval_every: int | None = None
    eval_samples: int = 8
    bf16: bool = False
    keep_texts: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def change(self, **changes: Any) -> FitOptions:
        """These options with some changed. `epochs` resets `max_steps`.

        Raises:
            ConfigError: an unknown option, a value outside its range, or both of these.

        >>> FitOptions().change(learning_rate=1e-3)
        Traceback (most recent call last):
            ...
        bhpeft_pyro.errors.ConfigError: learning_rate=0.001: no such option; expected lr
        """
        for name in (name for name in changes if name not in _RULES):
            near = get_close_matches(name, _RULES, cutoff=0.5)
            expected = _ELSEWHERE.get(name) or ", ".join(near or _RULES)
            raise ConfigError(f"{name}={shown(changes[name])}: no such option; expected {expected}")
        if "epochs" in changes:
            changes = {"max_steps": None, **changes}
        made = replace(self, **changes)
        if {"epochs", "max_steps"} <= changes.keys() and made.epochs and made.max_steps:
            both = f"epochs={made.epochs}, max_steps={made.max_steps}"
            raise ConfigError(f"{both}: each says how long the fit is; leave one out")
        return made

    @property
    def default_length(self) -> bool:
        """Whether neither `epochs` nor `max_steps` is given."""
        return self.epochs is None and self.max_steps is None

    def steps(self, per_epoch: int, brief: bool = False) -> int:
        """Optimiser steps of a fit with so many in an epoch. A brief one has by default 5 epochs,
        but at least 20 steps.

        >>> FitOptions().steps(25), FitOptions().steps(25, brief=True)
        (375, 125)
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is None and brief:
            return max(_LEAST_STEPS, _BRIEF * per_epoch)
        return (self.epochs or _EPOCHS) * per_epoch
