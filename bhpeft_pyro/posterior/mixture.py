"""`MixturePosterior`: independent fits as one posterior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import FitError
from ..guides import MixtureGuide
from ..guides.guide import title
from ..inference.report import FitReport
from ..model.model import Model
from ..options import FitOptions
from ..priors import MixturePrior
from .posterior import Posterior

__all__ = [
    "MixturePosterior",
    "keeping",
    "seeds",
]


_STRIDE = 1000  # so that the components of seeds 0, 1, 2, ... are not the same fits


def seeds(options: FitOptions, components: int) -> list[FitOptions]:
    """The options of each component: the seed that was given, then others far from it."""
    return [options.change(seed=options.seed + _STRIDE * r) for r in range(components)]


@contextmanager
def keeping(
    fitted: Sequence[Posterior], options: FitOptions, lineage: tuple[FitReport, ...] = ()
) -> Iterator[None]:
    """Where one fit fails, those that were fitted before it are the error's posterior.

    Args:
        fitted, options, lineage: as for `MixturePosterior.joined`.
    """
    try:
        yield
    except FitError as error:
        if fitted:
            error.posterior = MixturePosterior.joined(fitted, options, lineage)
        raise


class MixturePosterior(Posterior):
    """What `fit(..., components=R)` gives: R fits as one posterior, an equal-weight mixture.

    It predicts with equally many draws of each component; a number of draws that R does not divide
    is rounded up. With `samples=0` each component predicts once, from its central values. Where
    components found different modes, their disagreement counts as epistemic uncertainty, as in a
    deep ensemble.

    Each component is a whole `Posterior`, whose report says how its own fit went. Rounds keep them
    apart: `update` fits each under its own posterior as the prior, with a coreset of its own. The
    weights stay equal. By Bayes' rule a component's weight would be multiplied by the probability
    of the new data under it; but the components are R approximations of one posterior rather than
    R hypotheses, their evidence is known to a few nats at best, and as it is a sum over all
    examples, differences between components, errors included, would soon leave a single one.

    Attributes:
        components: the fits, the one with the options' own seed first.
        own_priors: whether each was fitted under a prior of its own, as in later rounds.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> options = {"max_steps": 3, "progress": False}
    >>> both = fit(tiny_model(()), "normal", tiny_examples(), components=2, **options)
    >>> len(both.components), both.predict(["w5 w20"], samples=3, keep_samples=True).samples.shape
    (2, torch.Size([4, 1, 2]))
    """

    def __init__(self, components: Sequence[Posterior], lineage: tuple[FitReport, ...]) -> None:
        first = components[0]
        self._components = tuple(components)
        prior = first.model.prior
        self.own_priors = any(each.model.prior is not prior for each in components)
        if self.own_priors:
            prior = MixturePrior([each.model.prior for each in components])
        model = Model(first.model.network, prior, first.model.likelihood)
        guide = MixtureGuide([each.guide for each in components])
        guide.follow(model)
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
            lineage: of the rounds before.
        """
        parent = lineage[-1].id if lineage else None
        report = FitReport.joined([each.report for each in components], options, parent)
        return cls(components, (*lineage, report))

    def __repr__(self) -> str:
        kind = title(self.components[0].guide)
        return (
            f"MixturePosterior(round {len(self.lineage)}, {len(self.components)} x {kind})\n"
            f"{self.report}"
        )

    def as_prior(self) -> MixturePrior:
        """The mixture as a prior to sample from; `update` fits each component under its own part.

        Raises:
            GuideError: the components are points, or not this package's guides.
        """
        return MixturePrior([each.as_prior() for each in self.components])

    def grow(self, labels: Sequence[str] | int) -> MixturePosterior:
        """Add labels to the head of every component; see `sequential.grow`."""
        grown = [each.grow(labels) for each in self.components]
        network = grown[0].model.network  # the others' are equal to it
        return MixturePosterior(
            [
                each.replace(model=Model(network, each.model.prior, each.model.likelihood))
                for each in grown
            ],
            self.lineage,
        )
