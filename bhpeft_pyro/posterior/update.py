"""A round: learn new data with the last posterior, partly forgotten or not, as the prior."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..base.progress import bars, work
from ..base.values import Flag, Share, checked_call
from ..data import Examples, LabelWarning
from ..data.batch import random_order
from ..data.copies import BY_CHANCE, among, check_apart, warn_of_contradictions
from ..data.table import table
from ..decisions.novelty import Novelty
from ..decisions.two_samples import separation
from ..errors import DataError, GuideError, PriorError
from ..guides.earlier import Earlier
from ..guides.guide import prior_of
from ..guides.laplace.choice_of_tau import best_output_scale
from ..model.cached_batches import naming_rows
from ..peft.sites import Sites
from ..priors import Prior
from ..priors.any_prior import independent_normals
from ..training.earlier_labels import with_earlier_texts
from ..training.loop import Callback, OptimizerFactory, Setup
from ..training.report import FitReport
from .distill import texts_for, with_student
from .forgetting import CHECKED, compared, forget, kept_texts, rows_kept
from .growth import with_outputs_for
from .learn import check_arguments, check_batches, learn, of_component, report_of, temperature
from .posterior import Posterior


@checked_call
def update(
    posterior: Posterior,
    data: object,
    validation: object | None,
    options: FitOptions | None,
    optimizer: OptimizerFactory | None,
    callback: Callback | None,
    executor: Executor | None,
    keep: Share,
    grow: Flag,
    again: Flag,
    distill: object | None,
    changes: Mapping[str, Any],
) -> Posterior:
    """See `Posterior.update`. Each component of a mixture is updated on its own."""
    if options is None and validation is None:  # the last round's patience had rows of its own
        changes = {"patience": None, **changes}
    options = (options or posterior.report.options).change(**changes)
    check_arguments(options, validation, optimizer, callback, executor)
    _check_goes_on(posterior, options)
    with bars(options.progress):
        if not isinstance(data, Examples):  # for its labels, and to be encoded
            data = table(data, posterior.columns.inputs(posterior.model.likelihood.kind))
        before, posterior = posterior, with_outputs_for(posterior, data, grow)
        examples = posterior.encode(data)
        held_out = None if validation is None else posterior.encode(validation)
        texts = None
        if distill is not None:
            texts = texts_for(posterior.model, distill, posterior.columns, options.seed)
        _check_rows(posterior, examples, held_out, again)
        rows, kept = keep * rows_kept(posterior.lineage), kept_texts(before, examples)
        earlier = Earlier(rows, learnt=_learnt_classes(posterior), texts=kept)
        with naming_rows(posterior.model, data=examples, validation=held_out):
            with work(share=0):
                forecasts = _central_forecasts(posterior, examples)
            _warn_of_labels(posterior, examples, forecasts, earlier)
            novelty, by_component = _compared(
                posterior, examples, forecasts, earlier, options, keep
            )
            setups, reports = [], []
            for number, last in enumerate(posterior.components):
                own = of_component(options, number)
                setup = _setup(last, examples, held_out, own, by_component[number], keep)
                setups.append(replace(setup, optimizer=optimizer, callback=callback))
                reports.append(report_of(setup, keep=keep, parent=last.report.id))
            last = posterior.replace(novelty=novelty)
            updated = learn(last, setups, reports, options, executor)
        if kept is not None:
            with work(share=0):
                updated = compared(before, updated, kept)
        return updated if texts is None else with_student(updated, texts, options)


def _check_goes_on(posterior: Posterior, options: FitOptions) -> None:
    """Refuse guides that are no prior or cannot be trained further, before data are read."""
    for part in posterior.components:
        prior_of(part.model, part.guide)
        check_batches(options, part.guide)
        if part.guide.draws_kept is not None:
            raise GuideError(
                "update: draws of a sampler cannot go on; expected a fit under them, such as "
                "bh.fit(posterior.model.with_prior(posterior.as_prior()), 'normal', data)"
            )


def _check_rows(
    posterior: Posterior, examples: Examples, held_out: Examples | None, again: bool
) -> None:
    """Refuse rows that were learnt before, unless they are to be learnt `again`."""
    check_held_out(posterior, examples, held_out)
    warn_of_contradictions(examples, held_out)
    if not again:
        refuse_known(posterior, examples)
        _warn_of_known(posterior, examples)


def _warn_of_labels(
    posterior: Posterior, examples: Examples, forecasts: Sequence[Any], earlier: Earlier
) -> None:
    """Say if the labels contradict what was learnt, or if there are new ones alone."""
    learnt = earlier.learnt
    if worse := _contradiction(posterior, forecasts, learnt):
        warn(
            LabelWarning(
                f"data: the labels contradict the posterior: before learning, {worse}; "
                "expected classes and scales as in earlier rounds"
            )
        )
        return
    new = learnt is not None and not learnt[examples.labels].any()
    if new and with_earlier_texts(earlier, examples)[1] is None:
        warn(
            LabelWarning(
                "data: all rows have labels that are new, so that every text would be taken for "
                "one of these; expected rows with earlier labels too, or texts that earlier rounds "
                "have kept (option keep_texts)"
            )
        )


def _compared(
    posterior: Posterior,
    examples: Examples,
    forecasts: Sequence[Any],
    earlier: Earlier,
    options: FitOptions,
    keep: float,
) -> tuple[Novelty | None, list[Earlier]]:
    """What recognises unlike texts after the round; and for each component what earlier rounds have
    learnt, with how the round's texts differ, and the output scale that suits them."""
    count = len(posterior.guides)
    if posterior.novelty is None:  # earlier texts are not known
        return None, [earlier] * count
    new = Novelty.of(posterior.model, examples, options.keep_texts)
    told = separation(posterior.novelty, new)
    scales = [1.0] * count
    default = options.epochs is None and options.max_steps is None and options.tau is None
    if default and told is not None:
        power = keep * (2 - 2 * told)
        scales = [s**power for s in _output_scales(posterior, forecasts, earlier.learnt)]
    each = [earlier._replace(separation=told, output_scale=scale) for scale in scales]
    return posterior.novelty.merged(new, keep), each


def _central_forecasts(posterior: Posterior, examples: Examples) -> list[Any]:
    """What each component predicts of examples at its central values, before it learns them; of
    some if they are many. Empty if a component has no central values."""
    some = examples.subset(random_order(len(examples))[:CHECKED])
    with suppress(GuideError):
        parts = [part.replace(novelty=None) for part in posterior.components]
        return [part.predict(some, samples=0) for part in parts]
    return []


def _contradiction(
    posterior: Posterior, forecasts: Sequence[Any], learnt: Tensor | None
) -> str | None:
    """How much worse than chance central forecasts of the labels are; None if it is less than two
    standard errors."""
    kind = posterior.model.likelihood.kind
    if not forecasts or kind not in ("rating", "class"):
        return None
    labels = forecasts[0].labels
    if kind == "rating":
        return _negative_correlation(torch.stack([each.mean for each in forecasts]).mean(0), labels)
    scores = torch.stack([each.probabilities for each in forecasts]).mean(0)
    if learnt is not None:
        known = learnt[labels]
        scores, labels = scores[known][:, learnt], (learnt.cumsum(0) - 1)[labels[known]]
    return _below_chance(scores, labels)


def _below_chance(scores: Tensor, labels: Tensor) -> str | None:
    """What to say if scores (N, C) choose labels (N,) less often than chance does."""
    count, chance = len(labels), 1 / scores.shape[1]
    right = int((scores.argmax(1) == labels).sum())
    if right >= count * chance - 2 * math.sqrt(count * chance * (1 - chance)):
        return None
    return f"it predicts {right / count:.0%} of {count} rows as labelled, and chance {chance:.0%}"


def _negative_correlation(means: Tensor, ratings: Tensor) -> str | None:
    """What to say if ratings (N,) fall where means (N,) rise."""
    count = len(ratings)
    r = torch.corrcoef(torch.stack([means, ratings]).double())[0, 1].item() if count > 1 else 0.0
    if not r * math.sqrt(count - 1) < -2:  # NaN if all are equal
        return None
    return f"its means for {count} rows have a correlation of {r:.2f} with the ratings"


def _output_scales(
    posterior: Posterior, forecasts: Sequence[Any], learnt: Tensor | None
) -> list[float]:
    """For each component the output scale with which central forecasts by all of them together
    would have suited best; 1 of other labels than classes and choices, and of new ones, which have
    no logits yet."""
    likelihood, none = posterior.model.likelihood, [1.0] * len(posterior.components)
    if not (forecasts and likelihood.softmax):
        return none
    labels = forecasts[0].labels
    if learnt is not None and not learnt[labels].all():
        return none
    logits = torch.stack([each.probabilities.double().clamp_min(1e-30).log() for each in forecasts])
    times = best_output_scale(logits, labels)  # the last scales, which are in these logits
    return [times * (part.report.output_scale or 1.0) for part in posterior.components]


def _learnt_classes(posterior: Posterior) -> Tensor | None:
    """(C,) which classes earlier rounds have learnt, None if it is all: the head of one that has
    only grown yet is zero."""
    if posterior.model.likelihood.grows:
        with suppress(GuideError):
            head = posterior.components[0].guide.means().get("head.weight")
            if head is not None and (learnt := head.cpu().any(1)).any() and not learnt.all():
                return learnt
    return None


def _setup(
    last: Posterior,
    examples: Examples,
    held_out: Examples | None,
    options: FitOptions,
    earlier: Earlier,
    keep: float,
) -> Setup:
    """What a component learns next."""
    model, guide, first = last.model, copy.deepcopy(last.guide), last.first_priors[0]
    model = model.with_prior(forget(keep, prior_of(model, guide), first, model.sites))
    guide.set_prior(model)
    # Few rows need the first prior. Where it is not known, what the guide takes for it may contain
    # what earlier data taught, so it acts in full too.
    few = with_earlier_texts(earlier, examples)[0].few
    enough = not few and first_sds(first, model.sites) is not None
    default = 0.0 if guide.informed() else 1.0
    weight = temperature(guide, options, enough, default)
    return Setup(model, guide, examples, held_out, options, temperature=weight, earlier=earlier)


def first_sds(first_prior: Prior | None, sites: Sites) -> dict[str, Tensor] | None:
    """By site, the sds of the first round's prior, if it is known and Normal."""
    with suppress(PriorError):
        normals = independent_normals(first_prior, sites, [site.name for site in sites], "guide")
        return {name: sd for name, (_, sd) in normals.items()}
    return None


def has_learnt(report: FitReport, examples: Examples) -> bool:
    """Whether a round has learnt these examples, but for those that it held out itself."""
    rest, _ = report.parted(examples)
    whole = examples.fingerprint
    return rest.fingerprint == report.data or whole == report.data_with_held_out


def refuse_known(
    posterior: Posterior,
    examples: Examples,
    argument: str = "data",
    why: str = " already, and they would count twice; again=True learns them again",
) -> None:
    """Raise a DataError if a round has learnt these examples."""
    for number, report in enumerate(posterior.lineage, 1):
        if has_learnt(report, examples):
            raise DataError(
                f"{argument}: round {number} ({report.id}) has learnt {report.examples} of these "
                f"examples{why}"
            )


def _warn_of_known(posterior: Posterior, examples: Examples) -> None:
    """Say how many of the rows have the text of a row of an earlier round, if they are many."""
    known = among(examples.hashes, posterior.learnt_rows)
    if known.sum() > BY_CHANCE * len(known):
        warn(
            f"data: {known.sum()} of {len(known)} rows have the text of a row that an earlier "
            "round has learnt or held out (case and spaces aside). What was learnt would count "
            "twice: give only the new rows; again=True learns all of them without this warning"
        )


def check_held_out(posterior: Posterior, examples: Examples, held_out: Examples | None) -> None:
    """Raise a DataError if this round is to learn all rows that are held out, or an earlier one
    has; warn if it is some of them."""
    if held_out is not None:
        check_apart(examples, held_out, "validation")
        refuse_known(posterior, held_out, "validation", "; expected rows that are not learnt")
        known = int(among(held_out.hashes, posterior.learnt_rows).sum())
        # Rows that were given may be given again; those that `fit` held out itself hardly are.
        earlier = sum(report.held_out for report in posterior.lineage if report.split is None)
        if posterior.point and known > earlier:
            warn(
                f"validation: {known} of {len(held_out)} rows have the text of a row "
                "that an earlier round has learnt (case and spaces aside), so the uncertainty may "
                "become too small; expected rows that are not learnt"
            )
