"""One more round: the last posterior, maybe partly forgotten, is its prior.

Replay without counting anything twice: a coreset, learnt last of all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..checks import COUNT, check_fields, one_of
from ..data import Examples
from ..errors import ConfigError, DataError
from ..guides import GuideLike
from ..guides.guide import is_point, prior_of
from ..inference.draws import sampling
from ..inference.loop import OptimizerFactory
from ..inference.report import FitReport
from ..model.model import Model
from ..options import FitOptions
from ..posterior.fit import check_how, fit_round, joined, pull_of
from ..posterior.mixture import MixturePosterior, keeping, seeds
from ..posterior.posterior import Posterior
from .forgetting import Forgetting
from .growth import with_outputs_for
from .projection import in_family

__all__ = [
    "Replay",
    "has_learnt",
    "refuse_known",
    "update",
]


By = Literal["random", "uncertain"]


@dataclass(frozen=True)
class Replay:
    """A coreset of at most `size` examples (Nguyen et al. 2018, variational continual learning).

    Round t has new data D and last round's coreset C. A new coreset C' is chosen out of both. The
    posterior of all else learns what is left of them, (D and C) without C'; a copy of it then
    learns C', and that copy is what predicts. So every example of every round is in the
    copy's evidence exactly once, and the next round starts without C', which it may learn or keep
    again.

    Args:
        size: examples kept.
        by: "random", equally likely for all; or "uncertain", those of which the last posterior
            knows least (epistemic uncertainty; in the first round, random).

    Raises:
        ConfigError: a size below 1, another `by`.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> kept, rest = Replay(size=3).split(tiny_examples(12), seed=0)
    >>> len(kept), len(rest)
    (3, 9)
    """

    size: int
    by: By = "random"

    def __post_init__(self) -> None:
        check_fields(self, {"size": COUNT, "by": one_of(*get_args(By))}, "Replay")

    def split(
        self, pool: Examples, seed: int, posterior: Posterior | None = None
    ) -> tuple[Examples, Examples]:
        """The coreset, and the rest of the pool.

        Args:
            pool: new data and the last coreset.
            seed: of the choice.
            posterior: the last one.

        Raises:
            ConfigError: nothing would be left to learn.
        """
        if self.size >= len(pool):
            raise ConfigError(
                f"Replay: size={self.size} leaves nothing of {len(pool)} examples to learn; "
                "keep fewer"
            )
        if self.by == "uncertain" and posterior is not None:
            order = posterior.predict(pool, seed=seed).epistemic.argsort(descending=True)
        else:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        kept, rest = order[: self.size], order[self.size :]
        return pool.subset(kept.sort().values), pool.subset(rest.sort().values)


@sampling()
def update(
    posterior: Posterior,
    data: object,
    *,
    validation: object | None,
    options: FitOptions,
    optimizer: OptimizerFactory | None,
    family: GuideLike | None,
    forgetting: Forgetting,
    replay: Replay | None,
    grow: bool,
    again: bool,
) -> Posterior:
    """See `Posterior.update`."""
    if isinstance(data, Iterator):  # for new labels it is read twice
        data = list(data)
    if isinstance(posterior, MixturePosterior):
        return _update_each(
            posterior,
            data,
            validation,
            options,
            grow,
            optimizer=optimizer,
            family=family,
            forgetting=forgetting,
            replay=replay,
            again=again,
        )
    check_how(options, validation, optimizer)
    # A guide that is no prior is refused before data is read.
    prior_of(posterior.model, posterior.guide)
    posterior = with_outputs_for(posterior, data, grow)
    model, coreset = posterior.model, posterior.coreset
    # With replay, last round's coreset is in the pool; without, it stays learnt.
    guide = posterior.guide if replay is None or coreset is None else coreset.guide
    last, projection = prior_of(model, guide), None
    if family is None:
        guide = copy.deepcopy(guide)
    else:
        guide, last, projection = in_family(model, last, family, options.seed)
    prior = forgetting(last, posterior.first_prior, model.sites)
    examples = posterior.encode(data)
    held_out = None if validation is None else posterior.encode(validation)
    if not again:
        refuse_known(posterior, examples)
    point = is_point(guide)
    report = FitReport(
        len(examples),
        examples.fingerprint,
        options,
        parent=posterior.report.id,
        keep=dict(forgetting.keep) if isinstance(forgetting.keep, Mapping) else forgetting.keep,
        floor=forgetting.floor,
        projection=projection,
        pull=pull_of(guide),
        held_out=len(held_out) if point and held_out is not None else 0,
    )
    kept = None
    if replay is not None:
        pool = examples if coreset is None else examples.concat(coreset.examples)
        report.learnt = pool.fingerprint
        seed = options.seed + len(posterior.lineage)  # other places in every round
        kept, examples = replay.split(pool, seed, posterior)
    start = posterior.replace(
        model=Model(model.network, prior, model.likelihood),
        guide=guide,
        lineage=(*posterior.lineage, report),
        coreset=None,
    )
    return fit_round(start, examples, held_out, optimizer, kept)


def _update_each(
    mixture: MixturePosterior,
    data: object,
    validation: object | None,
    options: FitOptions,
    grow: bool,
    **how: Any,
) -> Posterior:
    """Every component on its own, from data that are read once."""
    grown = with_outputs_for(mixture, data, grow)
    assert isinstance(grown, MixturePosterior)
    mixture = grown
    examples = mixture.encode(data)
    held_out = None if validation is None else mixture.encode(validation)
    if not how["again"]:  # the components do not know what a split was made of
        refuse_known(mixture, examples)
    every = zip(mixture.components, seeds(options, len(mixture.components)), strict=True)
    components: list[Posterior] = []
    for each, own in every:
        with keeping(components, options, mixture.lineage):
            components.append(
                update(each, examples, validation=held_out, options=own, grow=False, **how)
            )
    return joined(components, held_out, options, mixture.lineage)


def has_learnt(report: FitReport, examples: Examples) -> bool:
    """Whether a round was given these very examples, or learnt them all of what it was given, or
    all but those that it held out itself."""
    rest, _ = (examples, None) if report.split is None else examples.hold_out(report.split)
    known = (report.data, report.given)
    return examples.fingerprint in known or rest.fingerprint in known


def refuse_known(posterior: Posterior, examples: Examples) -> None:
    """Whether a round was given these very examples, or learnt them all of what it was given.

    Raises:
        DataError: one was.
    """
    for number, report in enumerate(posterior.lineage, 1):
        if has_learnt(report, examples):
            raise DataError(
                f"data: round {number} ({report.id}) has learnt {report.examples} of these "
                "examples already, and they would count twice; again=True (--again) learns them "
                "nevertheless"
            )
