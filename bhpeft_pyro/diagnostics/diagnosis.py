"""All that can be said of a posterior without a reference, as one short report.

How much of what the prior did not know has been learnt from data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..forecast import RatingForecast
from ..guides import prior_like
from ..inference.passes import Feed, max_rows
from ..inference.predict import AnyForecast, predict
from ..posterior.posterior import MixturePosterior
from .psis import PSIS, prepared, psis_of

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = [
    "Diagnosis",
    "Information",
    "diagnose",
    "information",
]


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
    examples = posterior.encode(data, labelled=False)
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


@dataclass(frozen=True)
class Diagnosis:
    """What is known of how good a posterior is, and what it learnt.

    Attributes:
        psis: how near the guide is to the posterior, over all latents.
        information: what was resolved, on the training texts.
        guards: warnings of the last round's report.
        components: of a `MixturePosterior` each by itself; the rest is of the mixture.

    >>> print(Diagnosis(PSIS(0.4, 250.0, -21.5, 0.05, 1000), Information(0.5, 0.1), ()))
    PSIS k-hat 0.40: good (within 0.67, the limit for 1000 draws); effective sample size 250.0; \
log evidence -21.50 ± 0.05
    mutual information of label and weights: 0.5000 nats a text under the prior, 0.1000 under the \
posterior: 80 % resolved
    no warnings
    """

    psis: PSIS
    information: Information
    guards: tuple[str, ...]
    components: tuple[Diagnosis, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.psis), str(self.information), *(self.guards or ["no warnings"])]
        for number, each in enumerate(self.components, 1):
            lines += [f"component {number}:", *(f"  {line}" for line in str(each).splitlines())]
        return "\n".join(lines)


def diagnose(posterior: Posterior, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
    """`psis` and `information` on the training data, and the report's guards.

    It costs a prediction of the training data with `samples` draws, and two with 64; for a
    mixture as much again for each component.

    Args:
        posterior: the posterior.
        data: what the last round was fitted to.
        samples: draws for k-hat, at least 100.
        seed: the same seed gives the same draws.

    Raises:
        DataError, ConfigError, GuideError: as `psis`.
    """
    feed = prepared(posterior, data, samples)
    components = posterior.components if isinstance(posterior, MixturePosterior) else ()
    return Diagnosis(
        psis=psis_of(posterior, feed, samples, seed),
        information=information_of(posterior, feed, min(samples, 64), seed),
        guards=tuple(posterior.report.guards),
        components=tuple(diagnose(each, data, samples, seed) for each in components),
    )
