"""Options of a fit, checked when they are created."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from ..errors import ConfigError
from .values import Count, Finite, Flag, Positive, Seed, checked_dataclass

_EPOCHS, _BRIEF = 15, 5  # of a fit, of a brief one
_LEAST_STEPS = 20  # of a brief one


@checked_dataclass
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
        lr: learning rate. None takes the default of the family: for "normal", natural-gradient
            steps (`NaturalGradient`) of B / N, at most 0.1; for point estimates ("laplace",
            "delta") Adam with 0.002, for all others Adam with 0.01. It rises over the first 5 % of
            the steps, and then falls to 0 along half a cosine.
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
        patience: with validation data, which are evaluated once an epoch, or at the end of a
            shorter fit, stop after this many evaluations without a lower NLL and return to the best
            state; None fits to the end and keeps the last. It does not apply where held-out rows
            choose the state of a point estimate (`temperature`).
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
    bhpeft_pyro.errors.ConfigError: particles=0: Input should be greater than or equal to 1
    """

    epochs: Count | None = None
    max_steps: Count | None = None
    batch_size: Count = 16
    particles: Count = 4
    lr: Positive | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    tau: Annotated[Finite, Field(ge=1e-5, le=1e5)] | None = None  # float32 holds sums with it
    patience: Count | None = None
    bf16: Flag = False
    keep_texts: Flag = False
    seed: Seed = 0
    progress: Flag = True

    def change(self, **changes: Any) -> FitOptions:
        """These options with some changed. `epochs` resets `max_steps`.

        Raises:
            ConfigError: an unknown option, a value outside its range, or both of these.

        >>> FitOptions().change(epoch=3)
        Traceback (most recent call last):
            ...
        bhpeft_pyro.errors.ConfigError: epoch=3: no such option; expected epochs
        """
        if "epochs" in changes:
            changes = {"max_steps": None, **changes}
        changed = replace(self, **changes)
        if {"epochs", "max_steps"} <= changes.keys() and changed.epochs and changed.max_steps:
            both = f"epochs={changed.epochs}, max_steps={changed.max_steps}"
            raise ConfigError(f"{both}: each says how long the fit is; leave one out")
        return changed

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
