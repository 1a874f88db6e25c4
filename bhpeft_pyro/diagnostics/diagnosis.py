"""All that can be said of a posterior without a reference, as one short report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..mixture import MixturePosterior
from .information import Information, information_of
from .psis import PSIS, prepared, psis_of

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["Diagnosis", "diagnose"]


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
