"""What a fit's report warns of: one line each, by site."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import FitReport

__all__ = ["guards"]

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
