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
from .feed import Feed
from .fisher import diagonal, from_prior
from .optimise import optimise
from .options import FitOptions
from .report import FitReport

__all__ = ["start"]

_EXAMPLES = 128  # on which the Fisher information is measured
_STEPS = 500  # at most, for the head


def start(model: Model, guide: NormalGuide, examples: Examples, options: FitOptions) -> None:
    """Move a guide to its start, in place.

    What weights tell about their scales comes first. Then the head is fitted to the frozen
    transformer's features, which are computed once; then the sds of the PEFT weights are set, at
    this head.
    """
    guide.narrow(from_prior(model, guide.means()))
    told: set[str] = set()
    if isinstance(model.network.head, Head):
        told = _narrow(model, guide, Feed(model, examples, frozen=True), options, told)
        if not model.network.kinds:
            return
        steps = options.epochs * -(-len(examples) // options.batch_size)
        brief = replace(
            options,
            max_steps=min(steps, _STEPS),
            accumulate=1,
            patience=None,
            progress=False,
        )
        report = FitReport(len(examples), examples.fingerprint, brief)
        optimise(model, guide, examples, None, report, frozen=True)
    _narrow(model, guide, Feed(model, examples), options, told)


def _narrow(
    model: Model, guide: NormalGuide, feed: Feed, options: FitOptions, told: set[str]
) -> set[str]:
    """Add what N examples tell about the latents to their precisions, but not to those `told`.

    Returns:
        Those told now: with frozen features the examples say nothing about PEFT weights.
    """
    generator = torch.Generator().manual_seed(options.seed)
    count = -(-_EXAMPLES // options.batch_size)
    device = model.network.device
    batches = [
        batch.to(device) for batch in islice(feed.training(options.batch_size, 1, generator), count)
    ]
    means = guide.means()
    information = diagonal(model, means, batches)
    # A scale has no effect where the weights that it multiplies are zero: there, those are drawn.
    silent = {name for name, more in information.items() if not more.any()}
    if silent := silent - {site.name for site in model.sites}:
        with torch.no_grad():
            drawn = guide() | {name: means[name] for name in silent}
        more = diagonal(model, drawn, batches)
        information |= {name: more[name] for name in silent}
    size = len(feed.examples) / options.temperature
    news = {
        name: size * more for name, more in information.items() if name not in told and more.any()
    }
    guide.narrow(news)
    return set(news)
