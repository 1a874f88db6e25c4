"""A width for points that are fitted already."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..data import Examples
from ..errors import GuideError
from ..guides import Guide, LaplaceGuide
from ..guides.guide import is_point
from ..inference.width import widen as measure
from ..model.model import Model
from .fit import is_open, joined
from .posterior import Posterior

__all__ = [
    "widen",
]


def widen(
    posterior: Posterior, data: object, *, validation: object | None, changes: Mapping[str, Any]
) -> Posterior:
    """See `Posterior.widen`."""
    parts = posterior.components
    for part in parts:
        if not isinstance(part.guide, Guide) or not is_point(part.guide):
            raise GuideError(
                f"widen: {type(part.guide).__name__} has a width of its own; expected a 'delta' "
                "guide"
            )
    examples = posterior.encode(data)
    held_out = None if validation is None else posterior.encode(validation)
    report = posterior.report
    if held_out is None and report.split is not None and examples.fingerprint == report.given:
        examples, held_out = examples.hold_out(report.split)
    options = report.options.change(**changes)
    wide = [_widened(part, examples, held_out, changes) for part in parts]
    return joined(wide, held_out, options)


def _widened(
    part: Posterior, examples: Examples, held_out: Examples | None, changes: Mapping[str, Any]
) -> Posterior:
    model, point = part.model, part.guide
    assert isinstance(point, Guide)
    guide = LaplaceGuide(model)
    means = point.means()
    values = torch.cat([means[name].flatten() for name in guide.means()])
    # The prior is centred where a start of its own was, as far as it is known: at the point on the
    # input side, whose projections are arbitrary.
    inner = {site.name for site in model.sites if site.role == "input"}
    center = torch.where(guide.at(inner), values, guide.prior.loc)
    prior = guide.recentre(center, guide.prior.covariance)
    guide.move(means)
    report = replace(
        copy.copy(part.report),
        examples=len(examples),
        data=examples.fingerprint,
        options=part.report.options.change(**changes),
        held_out=0 if held_out is None else len(held_out),
    )
    given = Model(model.network, prior, model.likelihood)
    model = measure(guide, given, examples, held_out, report, is_open(part.model))
    return Posterior(model, guide, (*part.lineage[:-1], report), part.columns, model.prior)
