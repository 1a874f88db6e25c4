"""The noise scale of ratings under a point estimate, from its errors.

Training rows that a network has memorised say nothing about the noise; held-out rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributions import Normal

from ..data import Examples
from ..guides import Guide
from ..model.cached_batches import CachedBatches
from ..model.likelihoods.normal import LEAST_NOISE
from ..model.model import Model
from ..prediction.predict import predict


def has_noise(guide: Guide, model: Model) -> bool:
    """Whether a guide is a point estimate with a noise scale, which a prior may fix."""
    return guide.point and model.likelihood.noise_site in guide.means()


def settle_noise(
    model: Model,
    guide: Guide,
    examples: Examples | CachedBatches,
    bf16: bool = False,
    learnt: bool = False,
) -> None:
    """Set the noise scale of ratings to the errors of a point estimate on some examples; if these
    were `learnt` by it, so that errors may be too small, only where that is larger."""
    _, noise = noise_of(model, guide, examples, bf16)
    if learnt:
        noise = noise.maximum(model.likelihood.log_noise(guide.means()).to(noise))
    guide.move(model.likelihood.with_log_noise(noise.float()))


def pool_noise(
    model: Model, guide: Guide, last: Tensor, here: Sequence[Tensor], share: float
) -> None:
    """Set the noise variance of ratings, after a later round, to the mean over all rounds' rows.

    The errors of this round's rows are too large before they are learnt, and too small afterwards:
    their geometric mean is taken.

    Args:
        last: the logarithm of the noise scale that earlier rounds have found, ().
        here: those that suit this round's rows before and after they are learnt.
        share: of the rows of all rounds, those of this one.
    """
    before, after = here
    variance = (after + before).exp()
    pooled = share * variance + (1 - share) * (2 * last.to(variance)).exp()
    guide.move(model.likelihood.with_log_noise(pooled.log().div(2).float()))


def noise_of(
    model: Model, guide: Guide, examples: Examples | CachedBatches, bf16: bool
) -> tuple[Tensor, Tensor]:
    """NLLs of ratings, (N,), under a point estimate with the noise scale that suits them, and the
    logarithm of that scale, ()."""
    forecast: Any = predict(model, guide, examples, 0, bf16=bf16)  # of ratings
    errors = (forecast.free_mean - forecast.observed()).double()
    log_scale = model.likelihood.log_noise(guide.means()).to(errors)
    sds = forecast.aleatoric.double().sqrt() / log_scale.exp()  # at a log scale of 0
    scale = (errors / sds).square().mean().sqrt().clamp_min(LEAST_NOISE)
    return -Normal(0.0, scale * sds).log_prob(errors), scale.log()
