"""The arms of the experiments with streams: ways to go from one round to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from torch import Tensor

from bhpeft_pyro.data import Examples
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.streams.stream import Learner
from bhpeft_pyro.training.report import new_id

from .ewc import Elastic, information, products

__all__ = ["ARMS", "AT_ONCE", "GUIDE", "OURS", "Arm", "Setup", "updating"]

GUIDE = "laplace"
"""The guide of the Bayesian arms: the package's default."""


@dataclass(frozen=True)
class Setup:
    """What all arms have in common.

    Attributes:
        model: makes one that is not fitted yet.
        batches: the data of all rounds, in order.
        seed: of the fits.
    """

    model: Callable[[], Model]
    batches: Mapping[str, Examples]
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Of every fit and round: all others are the defaults, as users have them."""
        return {"seed": self.seed, "progress": False}


Arm = Callable[[Setup], Learner]
"""One way to learn: makes the learner for `streams.prequential`."""

AT_ONCE = "all data at once"
"""What the names of the arms begin with that have learnt everything before the first round: only
their last scores mean anything."""
OURS = "posterior as prior"
"""What the names of the arms begin with whose cost is measured."""


def updating(components: int = 1, **how: Any) -> Arm:
    """`Posterior.update`.

    Args:
        components: of the posterior.
        how: other arguments of `update` than the default ones.
    """

    def learner(setup: Setup) -> Learner:
        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            options = setup.options
            if last is None:
                options |= {"components": components}
                return fit(setup.model(), GUIDE, data, **options)
            return last.update(data, **how, **options)

        return learn

    return learner


def fine_tuning(lr: float | None = None, replay: float = 0.0) -> Arm:
    """Ordinary fine-tuning, in every round from where the last one ended.

    Args:
        lr: its learning rate; by default that of the other arms.
        replay: the share of each earlier batch that is learnt again, the same rows in every round.
    """

    def learner(setup: Setup) -> Learner:
        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            options = {"lr": lr, **setup.options}
            if last is None:
                return fit(setup.model(), "delta", data, **options)
            earlier = list(setup.batches.values())[: len(last.lineage)] if replay else []
            again = [batch.subset(range(ceil(replay * len(batch)))) for batch in earlier]
            learnt = data.concat(*again)
            return _after(last, fit(last.model, copy.deepcopy(last.guide), learnt, **options), data)

        return learn

    return learner


def elastic(strength: float) -> Arm:
    """Fine-tuning with elastic weight consolidation (`ewc`).

    Args:
        strength: of the penalty.
    """

    def learner(setup: Setup) -> Learner:
        known: dict[str, dict[str, Tensor]] = {}  # the information until the end of a round

        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            if last is None:
                new = fit(setup.model(), "delta", data, **setup.options)
            elif last.report.id in known:
                network = last.model.network
                anchor = products(network, last.guide.means())
                prior = Elastic(network, anchor, known[last.report.id], strength)
                model = last.model.with_prior(prior)
                new = fit(model, copy.deepcopy(last.guide), data, **setup.options)
                new = _after(last, new, data)
            else:
                raise DataError("out: the information of these rounds is not saved; delete them")
            gained = information(new.model, new.guide.means(), data)
            before = {} if last is None else known[last.report.id]
            known[new.report.id] = {name: gained[name] + before.get(name, 0) for name in gained}
            return new

        return learn

    return learner


def at_once(components: int = 1) -> Arm:
    """One fit to all batches, before the first round.

    Args:
        components: of the posterior.
    """

    def learner(setup: Setup) -> Learner:
        def learn(last: Posterior | None, data: object) -> Posterior:
            assert isinstance(data, Examples)
            if last is not None:
                return _after(last, last, data)
            first, *others = setup.batches.values()
            options = {**setup.options, "components": components}
            learnt = fit(setup.model(), GUIDE, first.concat(*others), **options)
            return learnt.with_report(data=first.fingerprint, examples=len(first))

        return learn

    return learner


def _cumulative(setup: Setup) -> Learner:
    """A new fit to this and all earlier batches."""

    def learn(last: Posterior | None, data: object) -> Posterior:
        assert isinstance(data, Examples)
        count = 1 if last is None else 1 + len(last.lineage)
        batches = list(setup.batches.values())[:count]
        seen = batches[0].concat(*batches[1:])
        options = {**setup.options, "components": 1}
        new = fit(setup.model(), GUIDE, seen, **options)
        return new if last is None else _after(last, new, data)

    return learn


def _after(last: Posterior, new: Posterior, data: Examples) -> Posterior:
    """A separate fit as the round after `last`, with the data of that round."""
    of_data: dict[str, Any] = {"data": data.fingerprint, "examples": len(data)}
    report = replace(new.report, id=new_id(), parent=last.report.id, **of_data)
    return new.replace(lineage=(*last.lineage, report))


ARMS: dict[str, Arm] = {
    OURS: updating(),
    f"{OURS}, 5 components": updating(components=5),
    f"{OURS}, keep 0.9": updating(keep=0.9),
    f"{OURS}, 5 epochs": updating(epochs=5),
    "deterministic sequential": fine_tuning(),
    "deterministic sequential, lr 0.0005": fine_tuning(0.0005),
    "deterministic sequential, 5 % replay": fine_tuning(replay=0.05),
    **{f"EWC, strength {strength}": elastic(strength) for strength in (1, 100, 10_000, 1_000_000)},
    "all data so far": _cumulative,
    AT_ONCE: at_once(),
    f"{AT_ONCE}, 5 components": at_once(components=5),
}
