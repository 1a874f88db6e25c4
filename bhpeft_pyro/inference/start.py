"""Where a Normal guide starts: at a fitted head, with the sds of a diagonal Laplace approximation.

Natural-gradient steps are scaled by the sds. At the prior's, which are far too wide for what the
data say, the first steps go astray, on ratings beyond return.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch

from ..data import Examples
from ..guides import NormalGuide
from ..head import Head
from ..model import Model
from ..priors import FunctionSpacePrior
from .feed import Feed
from .fisher import diagonal, from_prior
from .optimise import optimise
from .options import FitOptions
from .report import FitReport

__all__ = ["start"]

_EXAMPLES = 128  # on which the Fisher information is measured
_STEPS = 500  # at most, for the head
_ROUNDS = 6  # in which the head's prior scale is found
_LEAST, _MOST = 0.05, 20.0  # between which it stays


def start(model: Model, guide: NormalGuide, examples: Examples, options: FitOptions) -> Model:
    """Move a guide to its start, in place.

    What weights tell about their scales comes first. Then the head is fitted to the frozen
    transformer's features, which are computed once, and with it the scale of its prior, if that
    was left open; then the sds of the PEFT weights are set, at this head.

    Returns:
        The model, under a prior in which nothing is left open.
    """
    guide.narrow(from_prior(model, guide.means()))
    told: set[str] = set()
    if isinstance(model.network.head, Head):
        frozen = Feed(model, examples, frozen=True)
        told = _narrow(model, guide, frozen, options, told)
        model = _fit_head(model, guide, frozen, options)
    if model.network.kinds:
        _narrow(model, guide, Feed(model, examples), options, told)
    return model


def _fit_head(model: Model, guide: NormalGuide, frozen: Feed, options: FitOptions) -> Model:
    prior = model.prior
    open_scale = isinstance(prior, FunctionSpacePrior) and prior.head is None
    if not (open_scale or model.network.kinds):
        return model  # the fit proper is about to do this
    size = len(frozen.examples)
    steps = min(options.epochs * -(-size // options.batch_size), _STEPS)
    rounds = _ROUNDS if open_scale else 1
    brief = replace(
        options,
        max_steps=-(-steps // rounds),
        accumulate=1,
        patience=None,
        progress=False,
    )
    for _ in range(rounds):
        report = FitReport(size, frozen.examples.fingerprint, brief)
        optimise(model, guide, frozen, None, report)
        if isinstance(prior, FunctionSpacePrior) and open_scale:
            prior = replace(prior, head=_head_scale(model, guide))
            model = Model(model.network, prior, model.likelihood)
    return model


def _head_scale(model: Model, guide: NormalGuide) -> float:
    """The scale of the head's prior at which the evidence lower bound of this guide is highest.

    With weights N(m, s^2) under N(0, (c u)^2) that is c^2 = mean((m^2 + s^2) / u^2). MacKay (1992)
    solves it for the weights about which data say something,
    c^2 = sum(m^2 / u^2) / sum(1 - s^2 / (c u)^2), and so gets there in few steps.
    """
    means, sds = guide.means(), guide.scales()
    power = told = 0.0
    for site in model.sites:
        if site.name.startswith("head."):
            sd = model.prior.sd(site)  # type: ignore[attr-defined]
            power += float((means[site.name] / site.unit).square().sum())
            told += float((1 - (sds[site.name] / sd).square()).sum())
    return min(max((power / max(told, 1e-3)) ** 0.5, _LEAST), _MOST)


def _narrow(
    model: Model, guide: NormalGuide, feed: Feed, options: FitOptions, told: set[str]
) -> set[str]:
    """Add what N examples tell about the latents to their precisions, but not to those `told`.

    Returns:
        Those told now: with frozen features the examples say nothing about PEFT weights.
    """
    generator = torch.Generator().manual_seed(options.seed)
    count = -(-_EXAMPLES // options.batch_size)
    batches = islice(feed.training(options.batch_size, 1, generator), count)
    device = model.network.device
    information = diagonal(model, guide.means(), (batch.to(device) for batch in batches))
    size = len(feed.examples) / options.temperature
    news = {
        name: size * more for name, more in information.items() if name not in told and more.any()
    }
    guide.narrow(news)
    return set(news)
