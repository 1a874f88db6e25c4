"""`FitReport`: what a fit did, for printing, for plots and for the saved file."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from ..checks import check_types
from ..data import Examples
from ..options import FitOptions

_COLLAPSED = 1e-3  # sd / prior sd: the data count a million times as much as the prior
_NOTHING = 0.1  # nats: no event's probability differs from the prior's by more than 0.22 (Pinsker)
_SKIPPED = 0.1  # of the steps
_LAST = 50  # steps over which losses are averaged
_FAR = 2.0  # factor between the temperature and 1


def new_id() -> str:
    """An id for a round."""
    return uuid.uuid4().hex[:12]


@dataclass
class FitReport:
    """The report of one round.

    Attributes:
        examples: N, the number of training examples.
        data: fingerprint of the training data.
        options: the options of the fit.
        steps: optimiser steps, including skipped ones.
        skipped: steps without an update, because the loss or gradient was not finite.
        seconds: wall time.
        history: one entry per step, in nats per example: step, loss, nll, kl, draws (weight draws;
            0 for a point estimate, whose kl is minus its log prior density), temperature (the
            weight of the KL at this step), lr, gradient (its norm), and validation_nll where it was
            evaluated.
        kl: KL to the prior per latent at the end, in nats for the whole data set. A joint guide has
            a single latent.
        marginal_kl: for a joint guide, the KL of each site's marginal.
        scales: geometric mean of posterior sd / prior sd, per site.
        points: sites with a point estimate. Their `kl` is minus the log prior density.
        unsettled: sites whose sds had not converged at the end.
        best_step: with early stopping, the step whose state was kept.
        id: identifies the round.
        parent: id of the round whose posterior was the prior; None in the first round.
        created: UTC time.
        keep: how much of the last posterior the prior kept (`Posterior.update`).
        projection: if the round changed the family of guides, KL(q || p) in nats from the last
            posterior q to the nearest p in the new family, from which the prior is made; 0 if the
            family can represent q. None if the family stayed.
        pull: default weight of the prior at a point estimate; None for other guides.
        held_out: rows that early stopping and the choice of the width used.
        split: the seed by which `fit` itself held these rows out of its data, if it did.
        tau: of a Laplace approximation, the multiple of the first prior's precision in its
            covariance (`inference/width.py`).
        noise: the noise scale of ratings, in their units, that was chosen with tau.
        point_nll: held-out NLL of the point estimate, with the noise scale that suits it; for a
            mixture, of the mixture of all point estimates.
        component_nll: held-out NLL with the width; for a mixture, of all components together.
        expected_nll: expected NLL of one training example under the posterior of the linearised
            network, the mean over at most 32 random ones. With the KL it gives the negative ELBO.
        between: for a mixture, the share of the epistemic uncertainty of held-out rows that comes
            from disagreement between components.
        name: your name for the round.
        metrics: numbers that you want to keep with it.
        components: for a mixture, the report of each component. In the mixture's report, steps and
            seconds are sums, losses and KLs are means, and scales are geometric means.
        given: fingerprint of the training data and of rows held out of the same source, if known.
        learnt: with replay, fingerprint of the training data and the examples replayed with them.
    """

    examples: int
    data: str
    options: FitOptions
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    kl: dict[str, float] = field(default_factory=dict)
    marginal_kl: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    best_step: int | None = None
    id: str = field(default_factory=new_id)
    parent: str | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    keep: float | dict[str, float] = 1.0
    projection: float | None = None
    pull: float | None = None
    held_out: int = 0
    split: int | None = None
    tau: float | None = None
    noise: float | None = None
    point_nll: float | None = None
    component_nll: float | None = None
    expected_nll: float | None = None
    between: float | None = None
    name: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    components: list[FitReport] = field(default_factory=list)
    given: str = ""
    learnt: str = ""

    @classmethod
    def joined(
        cls, components: Sequence[FitReport], options: FitOptions, parent: str | None
    ) -> FitReport:
        """The report of a mixture.

        Args:
            components: reports of the same data.
            options: as given, before each component got its own seed.
            parent: the id of the round before.
        """
        first = components[0]
        by_step: dict[float, list[dict[str, float]]] = {}
        for entry in (entry for report in components for entry in report.history):
            by_step.setdefault(entry["step"], []).append(entry)
        projections = [each.projection for each in components if each.projection is not None]
        same = ("points", "keep", "pull", "held_out", "split", "learnt", "given")
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
            scales={
                name: math.prod(each.scales[name] for each in components) ** (1 / len(components))
                for name in first.scales
            },
            unsettled=[*dict.fromkeys(name for each in components for name in each.unsettled)],
            parent=parent,
            projection=fmean(projections) if projections else None,
            components=list(components),
            **{name: getattr(first, name) for name in same},
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
    def temperature(self) -> float:
        """The weight of the KL that was used."""
        given = self.options.temperature
        if given is not None:
            return given
        return 1.0 if self.pull is None else self.pull

    @property
    def selects(self) -> bool:
        """Whether held-out rows choose which state of a point estimate is kept."""
        return self.options.temperature is None and self.pull == 0

    @property
    def negative_elbo(self) -> float:
        """Negative ELBO in nats per example; the mean loss of the last steps if unknown."""
        if self.components:
            return fmean(each.negative_elbo for each in self.components)
        if self.expected_nll is None:
            return self.last("loss")
        return self.expected_nll + sum(self.kl.values()) / self.examples

    @property
    def site_kl(self) -> dict[str, float]:
        """KL to the prior per site, where it is known, in nats for the whole data set."""
        return {name: kl for name, kl in self.kl.items() if name in self.scales} | self.marginal_kl

    @property
    def guards(self) -> list[str]:
        """Warnings, one line each; none for a sound fit.

        Warnings about sites cover those in `scales`: other guides' sds and KLs per site are
        unknown.
        """
        found = []
        if collapsed := [name for name, scale in self.scales.items() if scale < _COLLAPSED]:
            found.append(
                f"collapsed: the sds are below {_COLLAPSED:g} of the prior's, nearly a point "
                f"estimate, at {', '.join(collapsed)}"
            )
        # One side of a branch says little: LoRA's A may stay at the prior while B has learnt.
        branches: dict[str, float] = {}
        for name, kl in self.site_kl.items():
            branch = name.rpartition(".")[0] or name
            branches[branch] = max(branches.get(branch, 0.0), abs(kl))
        if nothing := [branch for branch, kl in branches.items() if kl < _NOTHING]:
            found.append(
                f"learnt nothing: still the prior (KL below {_NOTHING:g} nats) at all sites of "
                f"{', '.join(nothing)}"
            )
        if self.unsettled:
            found.append(f"not converged: the sds still move at {', '.join(self.unsettled)}")
        if self.skipped > _SKIPPED * self.steps:
            found.append(
                f"unstable: {self.skipped} of {self.steps} steps were skipped because the loss or "
                "gradient was not finite"
            )
        if not self._is_laplace:
            found += _unusual(self.temperature)
        return found

    @property
    def _is_laplace(self) -> bool:
        """Whether the temperature is that of a point estimate only, the prior's weight."""
        return any(each.tau is not None for each in (self, *self.components))

    def last(self, name: str, steps: int = _LAST) -> float:
        """The mean of a history entry over the last steps; nan for a guide that was trained
        elsewhere.

        >>> history = [{"loss": 1.0}, {"loss": 3.0}]
        >>> FitReport(9, "", FitOptions(), history=history).last("loss", steps=1)
        3.0
        """
        kept = self.history[-steps:]
        return fmean(entry[name] for entry in kept) if kept else math.nan

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FitReport:
        """From plain data, as `dataclasses.asdict` makes them; `floor`, which older ones have, is
        left out.

        Raises:
            KeyError, TypeError, AttributeError: fields are missing, unknown or of another type.
            ConfigError: an option has a value that it cannot have.
        """
        components = [cls.from_json(report) for report in data.get("components", [])]
        options = FitOptions(**data["options"])
        known = {name: value for name, value in data.items() if name != "floor"}
        report = cls(**{**known, "options": options, "components": components})
        check_types(report)
        return report

    def thinned(self) -> FitReport:
        """The same report with at most 100 steps in its history, and in those of its components.

        The last 50 are all there, so that it prints the same; of those before every n-th is.
        """
        early, late = self.history[:-_LAST], self.history[-_LAST:]
        every = max(1, math.ceil(len(early) / _LAST))
        components = [report.thinned() for report in self.components]
        return replace(self, history=[*early[::every], *late], components=components)

    def __str__(self) -> str:
        lines = [f"{self.steps} steps on {self.examples} examples"]
        if not self._is_laplace:
            lines[0] += f" at temperature {self.temperature:g}"
        if self.skipped:
            lines[0] += f", {self.skipped} skipped"
        if not self.steps:
            lines[0] = f"fitted elsewhere to {self.examples or 'unknown'} examples"
        if self.components:
            lines[0] = f"{len(self.components)} components, {lines[0]}"
        if self.history:
            lines.append(self._loss())
        if self.held_out:
            lines.append(f"{self.held_out} held-out rows{self._purpose()}")
        if self.tau is not None:
            lines.append(self._width())
        for number, report in enumerate(self.components if self.steps else (), 1):
            if report.tau is not None:
                lines.append(f"  component {number}: {report._width()}")
                continue
            converged = "" if not report.scales else ", sds converged"
            if report.unsettled:
                converged = ", sds not converged"
            lines.append(f"  component {number}: {report._loss()}{converged}")
        if self.components and self.component_nll is not None:
            lines.append(
                f"mixture: held-out NLL {self.component_nll:.3f} (of the point estimates alone "
                f"{self.point_nll:.3f})"
            )
        if self.between is not None:
            lines.append(
                f"disagreement between components: {self.between:.0%} of the epistemic uncertainty "
                "of the held-out rows"
            )
        if self.projection is not None:
            how = f"KL {self.projection:.2f} nats" if self.projection else "exact"
            lines.append(f"prior: the last posterior in the new family of guides, {how}")
        return "\n".join([*lines, *self._sites(), *self.guards])

    def _repr_html_(self) -> str:
        from ..html import report_html  # matplotlib is slow to import

        return report_html(self)

    def _sites(self) -> list[str]:
        width = max(map(len, [*self.scales, *self.points]), default=0)
        lines, kls = [], self.site_kl
        for name, scale in self.scales.items():
            kl = f"KL {kls[name]:9.2f} nats, " if name in kls else ""
            lines.append(f"  {name:<{width}}  {kl}posterior sd / prior sd {scale:.3f}")
        for name in self.points:
            cost = f"-log prior density {self.kl[name]:.2f} nats"
            lines.append(f"  {name:<{width}}  point estimate, {cost}")
        return lines

    def _purpose(self) -> str:
        """What the held-out rows were for, in words."""
        parts = (self, *self.components)
        step = ["early stopping"] if any(each.best_step is not None for each in parts) else []
        width = ["the width"] if any(each.component_nll is not None for each in parts) else []
        return f" for {' and '.join(step + width)}" if step + width else ""

    def _width(self) -> str:
        """A Laplace approximation in one line."""
        tau = self.tau or 1.0
        parts = [
            f"point estimate of step {self.best_step or self.steps}",
            f"prior weight {self.temperature:g}",
            f"tau {tau:.3g} (prior scale x {tau**-0.5:.3g})",
        ]
        if self.noise is not None:
            parts.append(f"noise scale {self.noise:.3g}")
        if self.component_nll is not None:
            parts.append(
                f"held-out NLL {self.component_nll:.3f} (point estimate {self.point_nll:.3f})"
            )
        if self.expected_nll is not None:
            total = self.negative_elbo
            parts.append(
                f"negative ELBO {total:.3f} = NLL {self.expected_nll:.3f} (of a sample of rows) + "
                f"KL {total - self.expected_nll:.3f}"
            )
        return ", ".join(parts)

    def _loss(self) -> str:
        point, loss = self.pull is not None, f"{self.last('loss'):.3f}"
        if point and self.temperature == 0:
            return f"loss {loss} nats per example"
        kl, nll = f"{self.last('kl'):.3f}", f"NLL {self.last('nll'):.3f}"
        unit = "nats per example"
        if point:  # it has a prior density instead of a KL
            return f"loss {loss} = {nll} + {self.temperature:g} x -log prior density {kl} {unit}"
        if self.temperature == 1:
            return f"negative ELBO {loss} = {nll} + KL {kl} {unit}"
        return f"loss {loss} = {nll} + {self.temperature:g} x KL {kl} {unit}"


def _mean(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the entries that have it."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    found = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return {name: fmean(values) for name, values in found.items()}


def _unusual(temperature: float) -> list[str]:
    if temperature == 0:
        return ["temperature 0: maximum likelihood, no posterior"]
    if 1 / _FAR <= temperature <= _FAR:
        return []
    kind = "cold" if temperature < 1 else "hot"
    return [
        f"temperature {temperature:g}: a {kind} posterior, as if every example had been seen "
        f"{1 / temperature:.3g} times"
    ]
