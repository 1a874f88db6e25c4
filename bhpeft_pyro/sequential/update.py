"""One more round: the last posterior, maybe partly forgotten, is its prior."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ..data import Examples
from ..errors import DataError
from ..fitting import PULL, check_how, fit_round, joined
from ..guides import GuideLike, LaplaceGuide
from ..guides.guide import is_point, prior_of
from ..inference.optimise import OptimizerFactory
from ..inference.options import FitOptions
from ..inference.report import FitReport
from ..inference.threads import fitting
from ..mixture import MixturePosterior, keeping, seeds
from ..model import Model
from ..posterior import Posterior
from .forgetting import Forgetting
from .growth import with_outputs_for
from .projection import in_family
from .replay import Replay

__all__ = ["has_learnt", "refuse_known", "update"]


@fitting()
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
    model, text, coreset = posterior.model, posterior.text, posterior.coreset
    # With replay, last round's coreset is in the pool; without, it stays learnt.
    guide = posterior.guide if replay is None or coreset is None else coreset.guide
    last, projection = prior_of(model, guide), None
    if family is None:
        guide = copy.deepcopy(guide)
    else:
        guide, last, projection = in_family(model, last, family, options.seed)
    prior = forgetting(last, posterior.first_prior, model.sites)
    examples = text.encode(model, data, labelled=True)
    held_out = None if validation is None else text.encode(model, validation, labelled=True)
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
        pull=(PULL if isinstance(guide, LaplaceGuide) else 1.0) if point else None,
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
    text, model = mixture.text, mixture.model
    examples = text.encode(model, data, labelled=True)
    held_out = None if validation is None else text.encode(model, validation, labelled=True)
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
