"""`FitReport`: what a fit did, for printing, for plots and for the saved file."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from ..base.fit_options import FitOptions
from ..base.values import Seed, checked_dataclass
from ..data import Examples
from .report_text import described, warnings_of

_LAST = 50  # steps over which losses are averaged
_OF_ALL = (  # fields that are the same in all components of a mixture
    "temperature",
    "keep",
    "prior",
    "separation",
    "held_out",
    "split",
    "data_with_held_out",
)


def new_id() -> str:
    """An id for a round."""
    return uuid.uuid4().hex[:12]


@checked_dataclass(frozen=False)
class FitReport:
    """The report of one round, which the fit fills in as it goes.

    Attributes:
        examples: N, the number of training examples.
        data: fingerprint of the training data.
        options: the options of the fit.
        temperature: the weight of the KL that was used.
        point: whether training was of a point estimate, which may have got a width afterwards.
        steps: optimiser steps, including skipped ones.
        skipped: steps without an update, because the loss or gradient was not finite.
        seconds: wall time.
        history: one entry per step, in nats per example: step, loss, nll, kl, draws (weight draws;
            0 for a point estimate, whose kl is minus its log prior density, under `laplace` above
            the least value; with it comes what the prior observes, over the temperature),
            temperature (the weight of the KL at this step), lr, gradient (its norm), and
            validation_nll where it was evaluated.
        kl: KL to the prior per latent at the end, in nats for the whole data set; where it has no
            closed form, a mean over 256 draws. A joint guide has a single latent.
        marginal_kl: for a joint guide, the KL of each site's marginal.
        scales: geometric mean of posterior sd / prior sd, per site.
        points: sites with a point estimate. Their `kl` is minus the log prior density.
        falling: whether the loss still fell at the end, and no held-out rows chose the state.
        best_step: with early stopping, the step whose state was kept.
        id: identifies the round.
        parent: id of the round whose posterior was the prior; None in the first round.
        created: UTC time.
        keep: how much of the last posterior the prior kept (`Posterior.update`).
        prior: in words, the prior of a first round, as it was given.
        held_out: rows that early stopping and the choice of width and output scale used.
        split: the seed by which `fit` itself held these rows out of its data, if it did.
        tau: of a Laplace approximation, the multiple of the first prior's precision in its
            covariance (`guides/laplace/width.py`).
        noise: the noise scale of ratings, in their units, that was chosen with tau.
        output_scale: the factor of a softmax's outputs in predictions. Held-out rows choose it
            after tau. Without them it is 1 in a first round, and in a later one what suits the
            last posterior's forecasts of the new rows (docs/method.md).
        point_nll: held-out NLL of the point estimate, with the noise scale that suits it; for a
            mixture, of the mixture of all point estimates.
        component_nll: held-out NLL with the width and the output scale; for a mixture, of all
            components together.
        expected_nll: expected NLL of one training example under the posterior of the linearised
            network, the mean over at most 32 random ones. With the KL it gives the negative ELBO.
        separation: of a later round, the AUROC with which its texts can be told from those of
            earlier rounds: from 0.5, of one kind, to 1; None if it is not known, or with fewer than
            19 texts (`decisions/two_samples.py`).
        compared: how many texts of earlier rounds, if they are kept (`FitOptions.keep_texts`), were
            predicted before and after this round, at most 256.
        changed: to how many of these the answer changed: another class, any label more or less, a
            mean rating that moved by more than its sd.
        score: in words, how good the forecast of the held-out rows is, beside the simplest one: of
            mixtures of Laplace approximations, and of what the program fits.
        name: your name for the round.
        metrics: numbers that you want to keep with it.
        components: for a mixture, the report of each component. In the mixture's report, steps and
            seconds are sums, losses and KLs are means, and scales are geometric means.
        data_with_held_out: fingerprint of the training data and of rows held out of the same
            source, if known.
        tests: fingerprints of the tests of a stream that the round was scored on, by name.
    """

    examples: int
    data: str
    options: FitOptions
    temperature: float = 1.0
    point: bool = False
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    kl: dict[str, float] = field(default_factory=dict)
    marginal_kl: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)
    falling: bool = False
    best_step: int | None = None
    id: str = field(default_factory=new_id)
    parent: str | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    keep: float = 1.0
    prior: str = ""
    held_out: int = 0
    split: Seed | None = None
    tau: float | None = None
    noise: float | None = None
    output_scale: float | None = None
    point_nll: float | None = None
    component_nll: float | None = None
    expected_nll: float | None = None
    separation: float | None = None
    compared: int = 0
    changed: int = 0
    score: str = ""
    name: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    components: list[FitReport] = field(default_factory=list)
    data_with_held_out: str = ""
    tests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_mixture(
        cls,
        components: Sequence[FitReport],
        options: FitOptions,
        parent: str | None = None,
        **fields: Any,
    ) -> FitReport:
        """The report of a mixture.

        Args:
            components: reports of the same data.
            options: as given, before each component got its own seed.
            parent: the id of the round before.
            fields: what is known of the mixture alone, such as `score`.
        """
        first = components[0]
        by_step: dict[float, list[dict[str, float]]] = {}
        for entry in (entry for report in components for entry in report.history):
            by_step.setdefault(entry["step"], []).append(entry)
        logs = [
            {name: math.log(scale) for name, scale in part.scales.items()} for part in components
        ]
        return cls(
            first.examples,
            first.data,
            options,
            steps=sum(report.steps for report in components),
            skipped=sum(report.skipped for report in components),
            seconds=sum(report.seconds for report in components),
            history=[_mean(entries) for _, entries in sorted(by_step.items())],
            kl=_mean([report.kl for report in components]),
            marginal_kl=_mean([report.marginal_kl for report in components]),
            scales={name: math.exp(log) for name, log in _mean(logs).items()},
            falling=any(part.falling for part in components),
            parent=parent,
            components=list(components),
            point=all(part.point for part in components),
            points=[name for name in first.points if all(name in p.points for p in components)],
            **{name: getattr(first, name) for name in _OF_ALL},
            **fields,
        )

    def parted(self, examples: Examples) -> tuple[Examples, Examples | None]:
        """What the fit learnt of its data and what it held out of them itself; other examples, or
        none held out, as they are."""
        if self.split is not None:
            rest, held_out = examples.hold_out(self.split)
            if rest.fingerprint == self.data:
                return rest, held_out
        return examples, None

    @property
    def negative_elbo(self) -> float:
        """Negative ELBO in nats per example; the mean loss of the last steps if unknown."""
        if self.components:
            return fmean(part.negative_elbo for part in self.components)
        if self.expected_nll is None:
            return self.last("loss")
        return self.expected_nll + sum(self.kl.values()) / self.examples

    @property
    def site_kl(self) -> dict[str, float]:
        """KL to the prior per site, where it is known, in nats for the whole data set."""
        return {name: kl for name, kl in self.kl.items() if name in self.scales} | self.marginal_kl

    @property
    def warnings(self) -> list[str]:
        """Warnings, one line each; none for a sound fit.

        Warnings about sites cover those in `scales`: other guides' sds and KLs per site are
        unknown.
        """
        return warnings_of(self)

    def last(self, name: str, steps: int = _LAST) -> float:
        """The mean of a history entry over the last steps; nan for a guide that was trained
        elsewhere.

        >>> history = [{"loss": 1.0}, {"loss": 3.0}]
        >>> FitReport(9, "", FitOptions(), history=history).last("loss", steps=1)
        3.0
        """
        kept = self.history[-steps:]
        return fmean(entry[name] for entry in kept) if kept else math.nan

    def thinned(self) -> FitReport:
        """The same report with at most 100 steps in its history, and in those of its components.

        The last 50 are all there, so that it prints the same; of those before every n-th is.
        """
        early, late = self.history[:-_LAST], self.history[-_LAST:]
        every = max(1, math.ceil(len(early) / _LAST))
        components = [report.thinned() for report in self.components]
        return replace(self, history=[*early[::every], *late], components=components)

    def __repr__(self) -> str:
        return f"FitReport(round {self.id}, {self.steps} steps on {self.examples} examples)"

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.score, described(self))))

    def _repr_html_(self) -> str:
        from ..plots.html import report_html  # matplotlib is slow to import

        return report_html(self)


def _mean(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the entries that have it."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: fmean(entry[name] for entry in entries if name in entry) for name in names}
