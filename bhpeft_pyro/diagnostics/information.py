"""How much of what the prior did not know has been learnt from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..forecast import RatingForecast
from ..guides import prior_like
from ..inference.feed import Feed
from ..inference.passes import max_rows
from ..inference.predict import AnyForecast, predict

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["Information", "information"]


@dataclass(frozen=True)
class Information:
    """Mutual information of a text's label and the weights, the mean over the texts, in nats.

    Attributes:
        prior: under the prior of the last round, of the network that the guide is a posterior of.
        posterior: under the guide.

    >>> print(Information(prior=0.5, posterior=0.1))
    mutual information of label and weights: 0.5000 nats a text under the prior, 0.1000 under the \
posterior: 80 % resolved
    """

    prior: float
    posterior: float

    @property
    def resolved(self) -> float:
        """1 - posterior / prior, 0 where nothing was learnt and 1 where nothing is left to learn.

        Below 0 where the data made predictions less certain. Of a converged posterior alone this
        is the data's doing: sds that are narrow because they started so look the same.
        """
        return 1 - self.posterior / self.prior if self.prior > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"mutual information of label and weights: {self.prior:.4f} nats a text under the "
            f"prior, {self.posterior:.4f} under the posterior: {100 * self.resolved:.0f} % resolved"
        )


def information(
    posterior: Posterior, data: object, samples: int = 64, seed: int = 0
) -> Information:
    """Compare prior and posterior on texts, which need no labels.

    For classes: the entropy of the mean prediction less the mean entropy. For ratings: half the
    logarithm of total over aleatoric variance, exact where the draws' means are Normal and share
    one noise scale. Either is found from S draws, and is too low by about its share 1 / S.

    Args:
        posterior: the posterior.
        data: texts; anything `Posterior.predict` reads.
        samples: S, of the prior and of the guide each.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: fewer than two samples.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(()), "normal", tiny_examples(), max_steps=50, progress=False)
    >>> 0 < information(fitted, ["w5 w20", "w6 w21"]).resolved < 1
    True
    """
    if samples < 2:
        raise ConfigError(f"samples={samples} must be at least 2")
    examples = posterior.text.encode(posterior.model, data, labelled=False)
    return information_of(posterior, Feed(posterior.model, examples), samples, seed)


def information_of(posterior: Posterior, feed: Feed, samples: int, seed: int) -> Information:
    """`information` on data that is ready to be run."""
    model, rows = posterior.model, max_rows(feed)
    guides = prior_like(model, posterior.guide), posterior.guide
    prior, after = (
        _nats(predict(model, guide, feed, samples, max_rows=rows, seed=seed)) for guide in guides
    )
    return Information(prior, after)


def _nats(forecast: AnyForecast) -> float:
    if isinstance(forecast, RatingForecast):
        ratio = forecast.epistemic.double() / forecast.aleatoric.double()
        return ratio.log1p().mean().item() / 2
    return forecast.epistemic.double().mean().item()
