"""A round: learn new data with the last posterior, partly forgotten or not, as the prior."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import torch

from ..base.fit_options import FitOptions
from ..base.progress import work
from ..base.threads import seeded
from ..data import Examples, LabelWarning
from ..data.copies import check_apart
from ..data.doubts import swapped, turned
from ..data.sources import read
from ..errors import ConfigError, DataError, GuideError
from ..guides import Guide, GuideLike, autoguide
from ..guides.guide import prior_of
from ..model.cached_batches import naming_rows
from ..model.model import Model
from ..priors import Prior, PriorLike, as_prior, closed_form
from ..priors.prior import check_prior
from ..training.initialization import centred, own_start
from ..training.report import FitReport
from .forgetting import forget
from .growth import with_outputs_for
from .mixture import MixturePosterior
from .posterior import Posterior
from .replay import seen_by, set_aside
from .rounds import (
    FitArguments,
    Start,
    first_sds,
    fit_components,
    note_first_prior,
    seeds,
)

_CHECKED = 256  # examples whose labels are compared with what is predicted


def update(
    posterior: Posterior,
    data: object,
    how: FitArguments,
    family: GuideLike | None,
    prior: PriorLike | None,
    keep: float | dict[str, float],
    *,
    grow: bool,
    again: bool,
) -> Posterior:
    """See `Posterior.update`. Each component of a mixture is updated on its own."""
    if prior is not None and keep != 1:
        raise ConfigError("prior: expected no keep, which makes a prior of its own")
    own = None if prior is None else as_prior(prior)
    for each in posterior.components if own is None else ():
        prior_of(each.model, each.guide)  # refused before data are read, if it cannot be one
    if not isinstance(data, Examples):  # for its labels, and to be encoded
        columns = posterior.model.limited(posterior.columns, data)
        data = read(data, posterior.model.likelihood.kind, columns, labelled=True)
    posterior = with_outputs_for(posterior, data, grow)
    examples = posterior.encode(data)
    held_out = None if how.validation is None else posterior.encode(how.validation)
    check_held_out(posterior, examples, held_out)
    if not again:
        refuse_known(posterior, examples)
    if own is not None:
        vectorised = how.options.particles > 1 and not posterior.guide.point
        check_prior(own, posterior.model.sites, vectorised)
    every = zip(posterior.components, seeds(how.options, len(posterior.components)), strict=True)
    lineage = posterior.lineage if isinstance(posterior, MixturePosterior) else ()
    with naming_rows(posterior.model, data=examples, validation=held_out):
        starts = [
            _start(last, examples, held_out, options, family, own, keep, how.replay)
            for last, options in every
        ]
        with work(share=0):
            doubt = _contradiction(posterior, examples)
        if doubt is not None:
            warnings.warn(LabelWarning(doubt), stacklevel=2)
        return fit_components(starts, held_out, how, lineage)


def _contradiction(posterior: Posterior, examples: Examples) -> str | None:
    """How the labels of examples, or of some if they are many, contradict what the posterior
    predicts for them at its central values; None if they do not, or it has none."""
    generator = torch.Generator().manual_seed(0)
    some = examples.subset(torch.randperm(len(examples), generator=generator)[:_CHECKED])
    found = None
    with suppress(GuideError):
        forecast: Any = posterior.predict(some, samples=0)
        labels = forecast.labels
        assert labels is not None
        if examples.kind == "rating":
            found = turned(forecast.mean, labels)
        elif examples.kind == "class":
            scores = forecast.probabilities
            # A class that has grown and was not learnt yet has a head of zeros.
            head = posterior.components[0].guide.means().get("head.weight")
            known = torch.ones(scores.shape[1], dtype=torch.bool)
            if head is not None and len(head) == len(known):
                known = head.cpu().any(1)
            there = known[labels]
            predicted = scores[there].masked_fill(~known, -1).argmax(1)
            names = forecast.label_names or [*map(str, range(len(known)))]
            found = swapped(predicted, labels[there], names)
    return found and f"data: the labels contradict the posterior, which {found}"


def _start(
    posterior: Posterior,
    examples: Examples,
    held_out: Examples | None,
    options: FitOptions,
    family: GuideLike | None,
    own: Prior | None,
    keep: float | dict[str, float],
    replay: int | None,
) -> Start:
    """A component before its fit."""
    model, coreset = posterior.model, posterior.coreset
    # With replay, the last coreset is in the pool; without, it stays learnt.
    guide = posterior.guide if replay is None or coreset is None else coreset.guide
    last, projection = prior_of(model, guide) if own is None else own, None
    if own is not None:
        under = model.with_prior(own)
        if family is None:
            guide = copy.deepcopy(guide)
            guide.strategy.reset_prior(under)
        else:
            guide = guide_under(under, family, options.seed)
            if guide.strategy.centres_prior:
                guide.move(own_start(under, options.seed))
        last = centred(under, guide).prior
    elif family is None:
        guide = copy.deepcopy(guide)
    else:
        guide, last, projection = in_family(model, last, family, options.seed)
        note_first_prior(guide, posterior)
    prior = forget(keep, last, posterior.first_prior, model.sites)
    report = FitReport(
        len(examples),
        examples.fingerprint,
        options,
        parent=posterior.report.id,
        keep=keep,
        projection=projection,
        own_prior=own is not None,
        held_out=len(held_out) if held_out and (guide.point or options.patience) else 0,
    )
    if guide.point and (examples.few or _takes_all(posterior, own)):
        report.pull = 1.0
    kept = None
    if replay is not None:
        pool, old, seen = examples, 0, 0
        if coreset is not None:
            pool, old = examples.concat(coreset.examples), len(coreset.examples)
            seen = seen_by(posterior.lineage)
        report.learnt = pool.fingerprint
        seed = options.seed + len(posterior.lineage)  # another choice in every round
        kept, examples = set_aside(pool, replay, seed, old, seen)
    start = posterior.replace(
        model=model.with_prior(prior),
        guide=guide,
        lineage=(*posterior.lineage, report),
        coreset=None,
    )
    return Start(start, examples, kept)


def _takes_all(posterior: Posterior, own: Prior | None) -> bool:
    """Whether what a guide takes for the first prior may contain what earlier data taught: it is a
    prior of your own, given now or before, or the first prior is not known."""
    before = any(report.own_prior for report in posterior.lineage)
    return own is not None or before or first_sds(posterior) is None


def in_family(
    model: Model, last: Prior, family: GuideLike, seed: int
) -> tuple[Guide, Prior, float]:
    """A guide of another family, at the last posterior or at the nearest member of the family.

    With it come the posterior as this family can represent it, which is the next round's prior, and
    the KL from the last posterior to it in nats.

    Raises:
        GuideError: the family is unknown, or cannot have this prior.
        PriorError: the last posterior cannot be projected.
    """
    # A guide of any family can be made under independent weights, and says if it is joint.
    alone, divergence = closed_form(last, "guide").independent()
    guide = guide_under(model.with_prior(alone), family, seed)
    if guide.joint:
        return guide_under(model.with_prior(last), family, seed), last, 0.0
    return guide, alone, divergence


def guide_under(model: Model, family: GuideLike, seed: int) -> Guide:
    """A new guide of a family."""
    with seeded(seed):
        guide: Guide = autoguide(family, model, components=1)
    return guide


def has_learnt(report: FitReport, examples: Examples) -> bool:
    """Whether a round has learnt these examples, but for those that it held out itself."""
    rest, _ = report.parted(examples)
    return rest.fingerprint == report.data or examples.fingerprint == report.given


def refuse_known(posterior: Posterior, examples: Examples) -> None:
    """Raise a DataError if a round has learnt these examples."""
    why = " already, and they would count twice; again=True learns them again"
    _refuse(posterior, examples, "data", why)


def check_held_out(posterior: Posterior, examples: Examples, held_out: Examples | None) -> None:
    """Raise a DataError if this round is to learn all rows that are held out, or an earlier one
    has; warn if it is some."""
    if held_out is not None:
        check_apart(examples, held_out, "validation")
        _refuse(posterior, held_out, "validation", "; expected rows that are not learnt")


def _refuse(posterior: Posterior, examples: Examples, what: str, why: str) -> None:
    for number, report in enumerate(posterior.lineage, 1):
        if has_learnt(report, examples):
            raise DataError(
                f"{what}: round {number} ({report.id}) has learnt {report.examples} of these "
                f"examples{why}"
            )
