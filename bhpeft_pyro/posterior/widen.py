"""A Laplace approximation around point estimates that are fitted already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..base.progress import bars, work
from ..data import Examples
from ..data.copies import check_apart
from ..errors import GuideError
from ..guides.laplace.laplace_guide import around_point
from ..training.initialization import centred
from ..training.noise import has_noise, settle_noise
from ..training.report import new_id
from .mixture import MixturePosterior
from .posterior import Posterior
from .rounds import Fitted, compute_width, joined, note_first_prior, parts_of


def widen(
    posterior: Posterior, data: object, *, validation: object | None, changes: Mapping[str, Any]
) -> Posterior:
    """See `Posterior.widen`."""
    for part in posterior.components:
        if not part.guide.point:
            raise GuideError(
                f"widen: {part.guide.title()} has a width already; expected a 'delta' guide"
            )
        if part.coreset is not None and len(part.lineage) > 1:
            raise GuideError(
                "widen: this round kept earlier examples for replay, of which the new width would "
                "know nothing; expected a posterior without replay, or of the first round"
            )
    examples = posterior.encode(data)
    held_out = None if validation is None else posterior.encode(validation)
    report = posterior.report
    if held_out is None:
        examples, held_out = report.parted(examples)
    else:
        check_apart(examples, held_out, "validation")
    options = report.options.change(**changes)
    wide = []
    parts = posterior.components
    with bars(options.progress), work("width", parts_of(len(parts)), at_once=True) as whole:
        for number, part in enumerate(parts, 1):
            whole.name(f"component {number} of {len(parts)}")
            wide.append(_widened(part, examples, held_out, changes))
            whole.next()
        whole.name("mixture")
        lineage = posterior.lineage[:-1] if isinstance(posterior, MixturePosterior) else ()
        return joined(wide, held_out, options, lineage, examples.labels)


def _widened(
    part: Posterior, examples: Examples, held_out: Examples | None, changes: Mapping[str, Any]
) -> Fitted:
    guide = around_point(part.model, part.guide)
    log_noise = part.model.likelihood.log_noise
    if has_noise(guide, part.model) and not log_noise(guide.means()).any():  # not yet set
        settle_noise(part.model, guide, examples)
    model = centred(part.model, guide)
    if later := len(part.lineage) > 1:
        note_first_prior(guide, part)
    report = replace(
        part.report,
        id=new_id(),  # a `History` may have the point estimate too
        examples=len(examples),
        data=examples.fingerprint,
        options=part.report.options.change(**changes),
        held_out=0 if held_out is None else len(held_out),
        metrics={},  # which were the point estimate's
        output_scale=None,  # of an earlier covariance, if it had one
    )
    model, width = compute_width(guide, model, examples, held_out, report)
    lineage = (*part.lineage[:-1], report)
    first = part.first_prior if later else model.prior
    return Posterior(model, guide, lineage, part.columns, first), width
