"""Several fits as one posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..base.fit_options import FitOptions
from ..base.progress import work
from ..data import Examples
from ..forecast.metrics import scored
from ..guides import MixtureGuide
from ..guides.laplace.choice_of_tau import Width
from ..guides.laplace.laplace_strategy import choose_together
from ..model.model import Model
from ..priors import MixturePrior
from ..training.report import FitReport
from .posterior import Posterior

__all__ = ["MixturePosterior"]

_SHARED = {"columns", "first_prior", "learnt_rows"}  # all components learn the same rows
_SHARE = 0.2  # what joining components takes, of the time of one of them, about


class MixturePosterior(Posterior):
    """Independent fits as one posterior: an equal-weight mixture (`fit(..., components=K)`).

    It predicts with equally many draws of each component; a number of draws that K does not divide
    is rounded up. With `samples=0` each component predicts once, from its central values.
    Disagreement between components that are in different modes counts as epistemic uncertainty, as
    in a deep ensemble.

    `update` fits each component under its own posterior as the prior. The weights stay equal: the
    components are K approximations of one posterior and not K hypotheses. Weights by their
    evidence, which is known to a few nats at best, would soon leave only one.

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
        model = first.model.with_prior(MixturePrior.of([part.model.prior for part in components]))
        guide = MixtureGuide([part.guide for part in components])
        shared = {name: getattr(first, name) for name in _SHARED}
        super().__init__(model, guide, lineage, **shared)

    @property
    def components(self) -> tuple[Posterior, ...]:
        return self._components

    def replace(self, **changes: Any) -> MixturePosterior:
        """The same posterior with some attributes changed, in its components too where they have
        them of the mixture."""
        new = super().replace(**changes)
        shared = {name: changes[name] for name in _SHARED & changes.keys()}
        new._components = tuple(part.replace(**shared) for part in self._components)
        return new

    @classmethod
    def of_round(
        cls,
        components: Sequence[Posterior],
        options: FitOptions,
        lineage: tuple[FitReport, ...] = (),
        **fields: Any,
    ) -> MixturePosterior:
        """Components that have just been fitted.

        Args:
            components: each with its own report of the round.
            options: those given for all of them.
            lineage: the reports of the rounds before.
            fields: of the mixture's report, as for `FitReport.of_mixture`.
        """
        reports = [part.report for part in components]
        parent = lineage[-1].id if lineage else None
        report = FitReport.of_mixture(reports, options, parent, **fields)
        return cls(components, (*lineage, report))

    def as_prior(self) -> MixturePrior:
        """The mixture as a prior to sample from; `update` fits each component under its own part.

        Raises:
            GuideError: the components are point estimates, or not guides of this package.
        """
        return MixturePrior([part.as_prior() for part in self.components])

    def grow(self, labels: Sequence[str]) -> MixturePosterior:
        """Add labels to the head of every component; see `posterior.growth`."""
        grown = [part.grow(labels) for part in self.components]
        network = grown[0].model.network  # shared: the others' are equal to it
        parts = [
            part.replace(model=Model(network, part.model.prior, part.model.likelihood))
            for part in grown
        ]
        return MixturePosterior(parts, self.lineage).replace(novelty=self.novelty)


class Fitted(NamedTuple):
    """A component after its round, with the width that was computed for it, if it has one."""

    posterior: Posterior
    width: Width | None


def parts_of(components: int) -> float:
    """The parts of the work on so many components, with what `joined` adds."""
    return components + _SHARE * (components > 1)


def lineage_of(number: int, lineage: Sequence[FitReport]) -> tuple[FitReport, ...]:
    """The reports of a component of the last round, whose number was another one in earlier rounds
    if a component before it has failed since."""
    *earlier, last = lineage
    reports = [last.components[number]]
    for mixture in reversed(earlier):
        by_id: dict[str | None, FitReport] = {each.id: each for each in mixture.components}
        reports.insert(0, by_id.get(reports[0].parent, mixture.components[number]))
    return tuple(reports)


def joined(
    fitted: Sequence[Fitted],
    held_out: Examples | None,
    options: FitOptions,
    labels: Tensor | None,
    lineage: tuple[FitReport, ...] = (),
) -> Posterior:
    """Components that have just been fitted as one posterior, with their widths chosen together.

    Args:
        fitted: the components.
        held_out: rows on which their disagreement and their score are measured.
        options: those given for all of them.
        labels: those that were learnt, which make the simplest forecast beside the score.
        lineage: of a mixture, the reports of the rounds before.
    """
    with work(share=_SHARE) as last:
        components, fields = [component for component, _ in fitted], dict[str, Any]()
        widths = [
            width for _, width in fitted if width is not None and width.candidates is not None
        ]
        if len(widths) == len(fitted) > 1:
            guides = [component.guide for component in components]
            reports, fields = choose_together(guides, widths)
            pairs = zip(components, reports, strict=True)
            components = [component.with_report(**said) for component, said in pairs]
        if len(fitted) == 1 and not lineage:
            return components[0]
        mixture = MixturePosterior(components, lineage)
        if held_out is not None and labels is not None and mixture.guide.linear:
            # Without backward passes, which would take as long as the choice of the widths.
            fields["score"] = scored(mixture.predict(held_out, 0), labels)
        last.next()
    return MixturePosterior.of_round(components, options, lineage, **fields)
