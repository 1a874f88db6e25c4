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
from .fisher import diagonal
from .optimise import optimise
from .options import FitOptions
from .report import FitReport

__all__ = ["start"]

_EXAMPLES = 128  # on which the Fisher information is measured
_STEPS = 500  # at most, for the head


def start(model: Model, guide: NormalGuide, examples: Examples, options: FitOptions) -> None:
    """Move a guide to its start, in place.

    First the head is fitted to the frozen transformer's features, which are computed once; then
    the sds of the PEFT weights are set, at this head.
    """
    peft = {site.name for site in model.network.attachment.sites}
    if isinstance(model.network.head, Head):
        rest = {site.name for site in model.sites} - peft
        _narrow(model, guide, Feed(model, examples, frozen=True), options, rest)
        if not peft:
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
    _narrow(model, guide, Feed(model, examples), options, peft)


def _narrow(
    model: Model, guide: NormalGuide, feed: Feed, options: FitOptions, sites: set[str]
) -> None:
    """Add what N examples tell about the weights to the precisions of some sites."""
    generator = torch.Generator().manual_seed(options.seed)
    count = -(-_EXAMPLES // options.batch_size)
    batches = islice(feed.training(options.batch_size, 1, generator), count)
    device = model.network.device
    information = diagonal(model, guide.means(), (batch.to(device) for batch in batches))
    size = len(feed.examples) / options.temperature
    guide.narrow({name: size * information[name] for name in sites})
