"""What a fit did: for the eye, for the plots and for the saved file.

What a fit's report warns of: one line each, by site.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..options import FitOptions

__all__ = [
    "FitReport",
    "guards",
    "unsettled",
]


_SETTLED = 0.05  # relative change of a site's sds that is still to come


@dataclass
class FitReport:
    """One round's fit.

    Attributes:
        examples: N.
        data: fingerprint of the training data.
        learnt: fingerprint of those and of the examples replayed with them, in a round that did.
        given: fingerprint of those and of the rows held out of the same source, where it is
            known (`bhpeft` notes it).
        options: as given.
        steps: optimiser steps, skipped ones included.
        skipped: steps left out because loss or gradient were not finite.
        seconds: wall time.
        history: one entry per step, in nats per example: step, loss, nll, kl, draws (of the
            weights; 0 of a point, whose kl is minus the log of its prior density), temperature (the
            weight of the KL at this step), lr, gradient (its norm, per example), and
            validation_nll where it was evaluated.
        kl: KL per latent at the end, in nats for the whole data set; a joint guide has but one.
        marginal_kl: under a joint guide, the KL per site of what it says of that site alone.
        scales: geometric mean per site of posterior sd / prior sd.
        points: sites that are held at a point; their `kl` is minus the logarithm of the prior
            density there.
        unsettled: sites whose sds were still on their way at the end, however slow the steps.
        best_step: the step whose state was kept, with early stopping.
        id: the round's own.
        parent: the id of the round whose posterior was the prior; None in the first round.
        created: when, in UTC.
        keep: how much of the last posterior the prior kept (`Posterior.update`).
        floor: the least sd of that prior, as a share of the first prior's.
        projection: KL(q || p) in nats, where the round has another family of guides, from the last
            posterior q to the nearest p in that family, which the prior is made of; 0 if it holds q
            as it is. None if the family has stayed.
        pull: the weight of the prior where options leave it open, and a point was fitted.
        held_out: rows that were held out, to stop and to choose the width by.
        split: the seed by which `fit` itself held them out of what it was given, if it did.
        tau, noise: of a Laplace approximation, what was chosen (`inference/width.py`): how much of
            the prior's precision is in its width; ratings' noise scale, in their units.
        point_nll, component_nll: held-out NLL of the point with the noise that suits it, and of the
            component; of a mixture of all points together, and of all components.
        expected_nll: of one training example under the posterior, in the linearised network; with
            the KL it makes the negative ELBO.
        between: of a mixture, the share of the epistemic uncertainty of held-out rows in which its
            components disagree.
        name: what its user calls the round.
        metrics: what its user noted about it.
        components: of a mixture, the report of each. What is said above is then of all of them:
            steps and seconds are sums, losses and KL means, scales geometric means.
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
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    parent: str | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    keep: float | dict[str, float] = 1.0
    floor: float = 0.0
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
        """One round of a mixture.

        Args:
            components: their reports, of the same data.
            options: those given, before each component got a seed of its own.
            parent: the id of the round before.
        """
        first = components[0]
        losses = [each.projection or 0.0 for each in components]
        by_step: dict[float, list[dict[str, float]]] = {}
        for entry in (entry for report in components for entry in report.history):
            by_step.setdefault(entry["step"], []).append(entry)
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
                name: math.prod(report.scales[name] for report in components)
                ** (1 / len(components))
                for name in first.scales
            },
            points=first.points,
            unsettled=[*dict.fromkeys(name for each in components for name in each.unsettled)],
            parent=parent,
            keep=first.keep,
            floor=first.floor,
            projection=None if first.projection is None else fmean(losses),
            pull=first.pull,
            held_out=first.held_out,
            split=first.split,
            components=list(components),
            learnt=first.learnt,
            given=first.given,
        )

    @property
    def temperature(self) -> float:
        """The weight of the KL."""
        given = self.options.temperature
        if given is not None:
            return given
        return 1.0 if self.pull is None else self.pull

    @property
    def selects(self) -> bool:
        """Whether a point is fitted of which held-out rows choose the state that is kept."""
        return self.options.temperature is None and self.pull == 0

    @property
    def negative_elbo(self) -> float:
        """In nats per example; the loss of the last steps, where no expectation is known."""
        if self.components:
            return fmean(each.negative_elbo for each in self.components)
        if self.expected_nll is None:
            return self.last("loss")
        return self.expected_nll + sum(self.kl.values()) / self.examples

    @property
    def site_kl(self) -> dict[str, float]:
        """KL by site, where it is known."""
        return {name: kl for name, kl in self.kl.items() if name in self.scales} | self.marginal_kl

    @property
    def guards(self) -> list[str]:
        """Warnings by site, such as sds collapsed or still moving, or nothing learnt."""
        return guards(self)

    def last(self, name: str, steps: int = 50) -> float:
        """The mean of a history entry over the last steps.

        >>> history = [{"loss": 1.0}, {"loss": 3.0}]
        >>> FitReport(9, "", FitOptions(), history=history).last("loss", steps=1)
        3.0
        """
        return fmean(entry[name] for entry in self.history[-steps:])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FitReport:
        """From plain data."""
        components = [cls.from_json(report) for report in data.get("components", [])]
        options = FitOptions(**data["options"])
        return cls(**{**data, "options": options, "components": components})

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps on {self.examples} examples at temperature "
            f"{self.temperature:g}" + (f", {self.skipped} skipped" if self.skipped else "")
        ]
        if self.components:
            lines[0] = f"{len(self.components)} components, {lines[0]}"
        if self.history:
            lines.append(self._loss())
        if self.held_out:
            lines.append(f"{self.held_out} rows held out, to stop and to choose the width by")
        if self.tau is not None:
            lines.append(self._width())
        for number, report in enumerate(self.components, 1):
            if report.tau is not None:
                lines.append(f"  component {number}: {report._width()}")
                continue
            sds = ", sds still moving" if report.unsettled else ", sds settled"
            lines.append(f"  component {number}: {report._loss()}{sds if report.scales else ''}")
        if self.components and self.component_nll is not None:
            lines.append(
                f"together: held-out NLL {self.component_nll:.3f} (points {self.point_nll:.3f})"
            )
        if self.between is not None:
            lines.append(
                f"components disagree: {self.between:.0%} of the epistemic uncertainty of the "
                "held-out rows"
            )
        if self.projection is not None:
            away = f"{self.projection:.2f} nats away from it" if self.projection else "as it is"
            lines.append(f"prior: the last posterior in the new family of guides, {away}")
        width = max(map(len, [*self.scales, *self.points]), default=0)
        kls = self.site_kl
        for name, scale in self.scales.items():
            kl = f"KL {kls[name]:9.2f} nats, " if name in kls else ""
            lines.append(f"  {name:<{width}}  {kl}sd / prior sd {scale:.3f}")
        for name in self.points:
            lines.append(f"  {name:<{width}}  -log prior {self.kl[name]:.2f} nats, a point")
        return "\n".join(lines + self.guards)

    def _width(self) -> str:
        stopped = self.best_step or self.steps
        parts = [f"step {stopped}, pull {self.temperature:g}, tau {self.tau:.3g}"]
        if self.noise is not None:
            parts.append(f"noise {self.noise:.3g}")
        if self.component_nll is not None:
            parts.append(f"held-out NLL {self.component_nll:.3f} (point {self.point_nll:.3f})")
        if self.expected_nll is not None:
            total = self.negative_elbo
            parts.append(
                f"negative ELBO {total:.3f} = NLL {self.expected_nll:.3f} + "
                f"KL {total - self.expected_nll:.3f}"
            )
        return ", ".join(parts)

    def _loss(self) -> str:
        point, times = self.pull is not None, f"{self.temperature:g} x "
        loss, nll = f"{self.last('loss'):.3f}", f"NLL {self.last('nll'):.3f}"
        if point and self.temperature == 0:
            return f"loss {loss} nats per example"
        plain = self.temperature == 1 and not point  # a point has a density, and no KL
        return (
            f"{'negative ELBO' if plain else 'loss'} {loss} = {nll} + {'' if plain else times}"
            f"{'-log prior' if point else 'KL'} {self.last('kl'):.3f} nats per example"
        )


def _mean(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, over the entries that have it."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    found = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def unsettled(slopes: Mapping[str, Sequence[Tensor]], temperature: float) -> list[str]:
    """Sites whose sds would still change by over 5 %, noise apart.

    At the optimum the gradient g of the loss with respect to log scale is zero; elsewhere the
    precision belongs at (1 + g / T) times what it is (the fixed point of `NaturalGradient`), which
    takes the sd through a relative change of about -g / 2 T. Unlike the change in the last steps,
    this does not look better when the learning rate has gone to zero.

    Args:
        slopes: per site the mean of g over its weights, at each of the last steps.
        temperature: T; at 0 the sds have no optimum.
    """
    found: list[str] = []
    if temperature == 0:
        return found
    for name, values in slopes.items():
        ahead = torch.stack(list(values)) / (2 * temperature)
        noise = ahead.std() / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
        if ahead.mean().abs() > _SETTLED + 2 * noise:
            found.append(name)
    return found


_COLLAPSED = 1e-3  # sd / prior sd: as if the data were worth a million priors
_NOTHING = 0.1  # nats: no event's probability differs from the prior's by more than 0.22 (Pinsker)
_SKIPPED = 0.1  # of the steps
_FAR = 2.0  # a temperature further from 1 than by this factor


def guards(report: FitReport) -> list[str]:
    """Warnings, none for a sound fit.

    Of sites it looks at those with a relative sd in the report: of other guides neither sds nor
    KL by site are known.
    """
    found = []
    collapsed = [name for name, scale in report.scales.items() if scale < _COLLAPSED]
    nothing = [name for name, kl in report.site_kl.items() if abs(kl) < _NOTHING]
    if collapsed:
        found.append(
            f"collapsed: the sds are below {_COLLAPSED:g} of the prior's, nearly a point, at "
            f"{', '.join(collapsed)}"
        )
    if nothing:
        found.append(
            f"learnt nothing: still the prior (KL below {_NOTHING:g} nats) at {', '.join(nothing)}"
        )
    if report.unsettled:
        found.append(f"not converged: the sds still move at {', '.join(report.unsettled)}")
    if report.skipped > _SKIPPED * report.steps:
        found.append(
            f"unstable: {report.skipped} of {report.steps} steps were left out, as loss or "
            "gradient were not finite"
        )
    measured = any(each.tau is not None for each in (report, *report.components))
    if not measured and (temperature := _temperature(report.temperature)):
        found.append(temperature)  # else it is that of the point, and not of its width
    return found


def _temperature(temperature: float) -> str | None:
    if temperature == 0:
        return "temperature 0: maximum likelihood, no posterior"
    if 1 / _FAR <= temperature <= _FAR:
        return None
    kind = "cold" if temperature < 1 else "hot"
    return (
        f"temperature {temperature:g}: a {kind} posterior, as if every example had been seen "
        f"{1 / temperature:.3g} times"
    )
