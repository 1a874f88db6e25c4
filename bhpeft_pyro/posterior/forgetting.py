"""Forgetting: on purpose, by a prior between the last posterior and the first prior; and how many
answers to earlier texts a round has changed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..data import Examples
from ..data.batch import random_order
from ..data.encoding import CutWarning
from ..errors import GuideError
from ..peft.sites import Site
from ..priors import Prior
from ..priors.any_prior import earlier_posterior, independent_normals
from ..training.report import FitReport
from .posterior import Posterior

CHECKED = 256
"""How many examples, at most, whose labels or answers are compared with what is predicted."""


def forget(keep: float, posterior: Prior, first: Prior | None, sites: Sequence[Site]) -> Prior:
    """The power prior p(w) = q(w)^keep p0(w)^(1 - keep) / Z, with q the last posterior and p0 the
    first prior.

    As q is p0 times a likelihood, this is p0 times that likelihood to the power `keep` (Ibrahim and
    Chen 2000). After R rounds the first round's evidence counts keep^(R - 1). For independent
    Normals q = N(m, s^2) and p0 = N(m0, s0^2):

        1 / v = keep / s^2 + (1 - keep) / s0^2
        mean  = v (keep m / s^2 + (1 - keep) m0 / s0^2)

    For a joint Normal the precision matrices are averaged in the same way.

    Args:
        keep: from 0 (start again) to 1 (forget nothing).
        posterior: q.
        first: p0.
        sites: of the model.

    Raises:
        PriorError: p0 is unknown or has observations or factors, or q or p0 is not Normal at a
            site.

    >>> import torch
    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.priors import PosteriorPrior
    >>> q = {"w": dist.Normal(torch.tensor([3.0]), 0.5).to_event(1)}
    >>> p0 = {"w": dist.Normal(torch.tensor([0.0]), 1.0).to_event(1)}
    >>> site = Site("w", (1,), ("in",), torch.ones(1), lambda: torch.zeros(1))
    >>> prior = forget(0.5, PosteriorPrior(q), PosteriorPrior(p0), [site])
    >>> normal = prior.distributions["w"]        # precision (4 + 1) / 2, mean 4 * 3 / (4 + 1)
    >>> normal.variance.item(), round(normal.mean.item(), 4)
    (0.4000..., 2.4)
    """
    if keep == 1:
        return posterior
    earlier, names = earlier_posterior(posterior, "keep"), [site.name for site in sites]
    return earlier.tempered(keep, independent_normals(first, sites, names, "keep"))


def rows_kept(lineage: Sequence[FitReport]) -> float:
    """How many rows the information of the last round's posterior is worth: those of all rounds,
    each times what later rounds kept."""
    kept = 0.0
    for report in lineage:
        kept = report.keep * kept + report.examples
    return kept


def kept_texts(posterior: Posterior, new: Examples) -> Examples | None:
    """Texts of earlier rounds, or some if they are many; None if none are kept, or if examples,
    such as the new ones, are more than one text each."""
    kept = () if posterior.novelty is None else posterior.novelty.texts
    texts = [text for text in kept if text]
    columns = posterior.columns
    alone = columns.inputs(new.kind) == (columns.text,) and not new.extra
    if not (texts and alone):
        return None
    order = random_order(len(texts))[:CHECKED]
    some = {columns.text: [texts[i] for i in order.tolist()]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=CutWarning)  # given when they were learnt
        return posterior.encode(some, labelled=False)


def compared(before: Posterior, after: Posterior, texts: Examples) -> Posterior:
    """`after` with the number of texts in its report to which its answer differs from that of
    `before`, at their central values; without it if they have none."""
    with suppress(GuideError):
        old: Any = before.replace(novelty=None).predict(texts, samples=0)
        new: Any = after.replace(novelty=None).predict(texts, samples=0)
        if texts.kind == "rating":
            changed = (new.mean - old.mean).abs() > old.sd
        else:
            changed = new.loss(old.label) > 0
        return after.with_report(compared=len(texts), changed=int(changed.sum()))
    return after
