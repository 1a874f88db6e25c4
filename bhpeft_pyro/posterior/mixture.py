"""Several fits as one posterior."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.fit_options import FitOptions
from ..guides import MixtureGuide
from ..model.model import Model
from ..priors import MixturePrior
from ..training.report import FitReport
from .posterior import Posterior

__all__ = ["MixturePosterior"]


class MixturePosterior(Posterior):
    """Independent fits as one posterior: an equal-weight mixture (`fit(..., components=K)`).

    It predicts with equally many draws of each component; a number of draws that K does not divide
    is rounded up. With `samples=0` each component predicts once, from its central values.
    Disagreement between components that are in different modes counts as epistemic uncertainty, as
    in a deep ensemble.

    `update` fits each component under its own posterior as the prior, with its own coreset. The
    weights stay equal: the components are K approximations of one posterior and not K hypotheses.
    Weights by their evidence, which is known to a few nats at best, would soon leave only one.

    Attributes:
        components: the fits, that of the options' seed first. Each has a report of its own.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> options = {"max_steps": 3, "progress": False}
    >>> both = fit(tiny_model(()), "normal", tiny_examples(), components=2, **options)
    >>> len(both.components), both.predict(["w5 w20"], samples=3, keep_samples=True).samples.shape
    (2, torch.Size([4, 1, 2]))
    """

    is_mixture = True

    def __init__(self, components: Sequence[Posterior], lineage: tuple[FitReport, ...]) -> None:
        first = components[0]
        self._components = tuple(components)
        model = first.model.with_prior(MixturePrior.of([each.model.prior for each in components]))
        guide = MixtureGuide([each.guide for each in components])
        super().__init__(model, guide, lineage, first.columns, first.first_prior)

    @property
    def components(self) -> tuple[Posterior, ...]:
        return self._components

    @classmethod
    def joined(
        cls,
        components: Sequence[Posterior],
        options: FitOptions,
        lineage: tuple[FitReport, ...] = (),
    ) -> MixturePosterior:
        """Components that have just been fitted.

        Args:
            components: each with its own report of the round.
            options: those given for all of them.
            lineage: the reports of the rounds before.
        """
        parent = lineage[-1].id if lineage else None
        report = FitReport.joined([each.report for each in components], options, parent)
        return cls(components, (*lineage, report))

    def as_prior(self) -> MixturePrior:
        """The mixture as a prior to sample from; `update` fits each component under its own part.

        Raises:
            GuideError: the components are point estimates, or not guides of this package.
        """
        return MixturePrior([each.as_prior() for each in self.components])

    def grow(self, labels: Sequence[str] | int) -> MixturePosterior:
        """Add labels to the head of every component; see `posterior.growth`."""
        grown = [each.grow(labels) for each in self.components]
        network = grown[0].model.network  # shared: the others' are equal to it
        return MixturePosterior(
            [
                each.replace(model=Model(network, each.model.prior, each.model.likelihood))
                for each in grown
            ],
            self.lineage,
        )
