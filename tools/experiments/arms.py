"""The arms of the experiments with streams: ways to go from one round to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bhpeft_pyro.data import Examples
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.streams.stream import Learner

__all__ = ["ARMS", "GUIDE", "OURS", "Arm", "Setup", "updating"]

GUIDE = "laplace"
"""The guide of the Bayesian arms: the package's default."""
_BATCH = 16


@dataclass(frozen=True)
class Setup:
    """What all arms have in common.

    Attributes:
        model: makes one that is not fitted yet.
        batches: the data of all rounds, in order.
        unlabelled: texts that set the coordinates in the first round; by default its own.
        epochs: passes over a round's data.
        least: optimiser steps of a round, at least: with few rows there are more epochs.
        seed: of the fits.
    """

    model: Callable[[], Model]
    batches: Mapping[str, Examples]
    unlabelled: Examples | None
    epochs: int
    least: int = 20
    seed: int = 0

    def options(self, *rows: int) -> dict[str, Any]:
        """How to fit rounds of so many rows at once: with as many steps as one after the other."""
        epochs_of = (-(-count // _BATCH) for count in rows)
        steps = sum(epoch * max(self.epochs, -(-self.least // epoch)) for epoch in epochs_of)
        return {"max_steps": steps, "batch_size": _BATCH, "seed": self.seed, "progress": False}


Arm = Callable[[Setup], Learner]
"""One way to learn: makes the learner for `streams.prequential`."""

OURS = "posterior as prior"
"""What the names of the arms begin with whose cost is measured."""


def updating(components: int = 1) -> Arm:
    """`Posterior.update`.

    Args:
        components: of the posterior.
    """

    def learner(setup: Setup) -> Learner:
        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            options = setup.options(len(data))
            if last is None:
                options |= {"unlabelled": setup.unlabelled, "components": components}
                return fit(setup.model(), GUIDE, data, **options)
            return last.update(data, **options)

        return learn

    return learner


def fine_tuning(lr: float | None = None) -> Arm:
    """Ordinary fine-tuning, in every round from where the last one ended.

    Args:
        lr: its learning rate; by default that of the other arms.
    """

    def learner(setup: Setup) -> Learner:
        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            options = {"temperature": 0.0, "lr": lr, **setup.options(len(data))}
            if last is None:
                return fit(setup.model(), "delta", data, **options)
            return _after(last, fit(last.model, copy.deepcopy(last.guide), data, **options), data)

        return learn

    return learner


def _cumulative(setup: Setup) -> Learner:
    """A new fit to this and all earlier batches, as long as all their rounds together."""

    def learn(last: Posterior | None, data: object) -> Posterior:
        assert isinstance(data, Examples)
        count = 1 if last is None else 1 + len(last.lineage)
        batches = list(setup.batches.values())[:count]
        seen = batches[0].concat(*batches[1:])
        options = setup.options(*map(len, batches))
        options |= {"unlabelled": setup.unlabelled, "components": 1}
        new = fit(setup.model(), GUIDE, seen, **options)
        return new if last is None else _after(last, new, data)

    return learn


def _after(last: Posterior, new: Posterior, data: Examples) -> Posterior:
    """A separate fit as the round after `last`, with the data of that round."""
    report = replace(new.report, parent=last.report.id, data=data.fingerprint, examples=len(data))
    return new.replace(lineage=(*last.lineage, report))


ARMS: dict[str, Arm] = {
    OURS: updating(),
    f"{OURS}, 5 components": updating(components=5),
    "deterministic sequential": fine_tuning(),
    "deterministic sequential, lr 0.0005": fine_tuning(0.0005),
    "all data so far": _cumulative,
}
