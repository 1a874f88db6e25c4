"""A Laplace approximation around point estimates that are fitted already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..base.progress import bars, work
from ..data import Examples
from ..data.copies import check_apart
from ..decisions.novelty import Novelty
from ..errors import DataError, GuideError
from ..guides import LaplaceGuide
from ..training.estimated_noise import has_noise, settle_noise
from ..training.initialization import centred
from ..training.loop import Setup
from .learn import learn, report_of, temperature
from .posterior import Posterior
from .update import first_sds

# Fields of a report that a width changes. A `History` may have the point estimate too, by its id;
# and the metrics are of that.
_NEW = (
    "id",
    "options",
    "temperature",
    "point",
    "held_out",
    "metrics",
    "score",
    "output_scale",
    "examples",
    "data",
)


def widen(
    posterior: Posterior, data: object, *, validation: object | None, changes: Mapping[str, Any]
) -> Posterior:
    """See `Posterior.widen`."""
    for guide in posterior.guides:
        if not guide.point:
            raise GuideError(f"widen: {guide.title()} cannot get a width; expected a 'delta' guide")
    examples, novelty = posterior.encode(data), posterior.novelty
    every, first = examples, len(posterior.lineage) == 1
    held_out = None if validation is None else posterior.encode(validation)
    if held_out is None:
        examples, held_out = posterior.report.parted(examples)
        learnt = posterior.report
        if learnt.data not in ("", examples.fingerprint):
            raise DataError(
                f"data: these {len(examples)} examples are not the {learnt.examples} that the last "
                "round learnt, or are in another order; expected these, or validation rows"
            )
    else:
        check_apart(examples, held_out, "validation")
    options = posterior.report.options.change(**changes)
    if novelty is None and first:  # of an adapter that was trained elsewhere
        novelty = Novelty.of(posterior.model, every, options.keep_texts)
    parts = posterior.components
    with bars(options.progress), work("width", at_once=True):
        setups = [_setup(part, examples, held_out, changes) for part in parts]
    reports = [
        report_of(setup, **{k: v for k, v in vars(part.report).items() if k not in _NEW})
        for setup, part in zip(setups, parts, strict=True)
    ]
    last = posterior.replace(lineage=posterior.lineage[:-1], novelty=novelty)
    widened = learn(last, setups, reports, options, train=False)
    return widened.with_report(name=posterior.report.name)


def _setup(
    part: Posterior, examples: Examples, held_out: Examples | None, changes: Mapping[str, Any]
) -> Setup:
    """A Laplace approximation around a component's point estimate, without a covariance yet."""
    guide, last = LaplaceGuide.around(part.model, part.guide), part.report
    log_noise = part.model.likelihood.log_noise
    if has_noise(guide, part.model) and not log_noise(guide.means()).any():  # not yet set
        settle_noise(part.model, guide, examples)
    model = centred(part.model, guide)
    sds = first_sds(part.first_priors[0], model.sites) if len(part.lineage) > 1 else None
    if sds is not None:
        guide.set_first_scale(torch.cat([sds[n].to(guide.loc).flatten() for n in guide.shapes]))
    options = last.options.change(**changes)
    weight = temperature(guide, options, True, last.temperature)
    return Setup(model, guide, examples, held_out, options, temperature=weight)
