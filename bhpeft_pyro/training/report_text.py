"""A fit report in words: its lines, and warnings of what may have gone wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import FitReport

_COLLAPSED = 1e-3  # sd / prior sd: the data count a million times as much as the prior
_NOTHING = 0.1  # nats: no event's probability differs from the prior's by more than 0.22 (Pinsker)
_SKIPPED = 0.1  # of the steps
_FAR = 2.0  # factor between the temperature and 1


def warnings_of(report: FitReport) -> list[str]:
    """The warnings of `FitReport.warnings`."""
    lines = []
    if collapsed := [name for name, scale in report.scales.items() if scale < _COLLAPSED]:
        lines.append(
            f"collapsed: the sds are below {_COLLAPSED:g} of the prior's, nearly a point "
            f"estimate, at {', '.join(collapsed)}"
        )
    # One side of a branch says little: LoRA's A may stay at the prior while B has learnt.
    branches: dict[str, float] = {}
    for name, kl in report.site_kl.items():
        branch = name.rpartition(".")[0] or name
        branches[branch] = max(branches.get(branch, 0.0), abs(kl))
    if nothing := [branch for branch, kl in branches.items() if kl < _NOTHING]:
        lines.append(
            f"learnt nothing: still the prior (KL below {_NOTHING:g} nats) at all sites of "
            f"{', '.join(nothing)}"
        )
    if report.falling:
        lines.append("not converged: the loss still falls; set more epochs, or another lr")
    if report.skipped > _SKIPPED * report.steps:
        lines.append(
            f"unstable: {report.skipped} of {report.steps} steps were skipped because the loss or "
            "gradient was not finite"
        )
    if _is_laplace(report):
        return lines
    if report.temperature == 0:
        lines.append("temperature 0: maximum likelihood, no posterior")
    elif not 1 / _FAR <= report.temperature <= _FAR:
        kind = "cold" if report.temperature < 1 else "hot"
        lines.append(
            f"temperature {report.temperature:g}: a {kind} posterior, as if every example had been "
            f"seen {1 / report.temperature:.3g} times"
        )
    return lines


def described(report: FitReport) -> str:
    """What the fit did, its warnings at the end; many lines."""
    lines = [_length(report)]
    if report.history:
        lines.append(_loss(report))
    lines += _held_out(report)
    if report.tau is not None:
        lines.append(_width(report))
    for number, part in enumerate(report.components if report.steps else (), 1):
        lines.append(f"  component {number}: {_loss(part) if part.tau is None else _width(part)}")
    if report.components and report.component_nll is not None:
        lines.append(
            f"mixture: held-out NLL {report.component_nll:.3f} (of the point estimates alone "
            f"{report.point_nll:.3f})"
        )
    return "\n".join([*lines, *_earlier(report), *_sites(report), *warnings_of(report)])


def _length(report: FitReport) -> str:
    words = f"{report.steps} steps on {report.examples} examples"
    if not report.steps:
        words = f"fitted elsewhere to {report.examples or 'unknown'} examples"
    elif not _is_laplace(report):
        words += f" at temperature {report.temperature:g}"
    if report.skipped:
        words += f", {report.skipped} skipped"
    return f"{len(report.components)} components, {words}" if report.components else words


def _held_out(report: FitReport) -> list[str]:
    if not report.held_out:
        return []
    parts = (report, *report.components)
    uses = ["early stopping"] if any(part.best_step is not None for part in parts) else []
    uses += ["the width"] if any(part.component_nll is not None for part in parts) else []
    purpose = f" for {' and '.join(uses)}" if uses else ""
    return [f"{report.held_out} held-out rows{purpose}"]


def _earlier(report: FitReport) -> list[str]:
    """What there is to say of earlier rounds."""
    lines = []
    if report.separation is not None:
        lines.append(
            "a linear classifier tells these texts from those of earlier rounds with AUROC "
            f"{report.separation:.2f} (0.5: the same kind, 1: another kind)"
        )
    if report.compared:
        lines.append(
            f"{report.changed} of {report.compared} answers to kept texts of earlier rounds changed"
        )
    return lines


def _sites(report: FitReport) -> list[str]:
    width = max(map(len, [*report.scales, *report.points]), default=0)
    lines, kls = [], report.site_kl
    for name, scale in report.scales.items():
        kl = f"KL {kls[name]:9.2f} nats, " if name in kls else ""
        lines.append(f"  {name:<{width}}  {kl}posterior sd / prior sd {scale:.3f}")
    for name in report.points:
        cost = f"-log prior density {report.kl[name]:.2f} nats"
        lines.append(f"  {name:<{width}}  point estimate, {cost}")
    return lines


def _width(report: FitReport) -> str:
    """A Laplace approximation in one line."""
    tau = report.tau or 1.0
    parts = [
        f"point estimate of step {report.best_step or report.steps}",
        f"{'first ' if report.parent else ''}prior weight {report.temperature:g}",
        f"tau {tau:.3g} (prior scale x {tau**-0.5:.3g})",
    ]
    if report.noise is not None:
        parts.append(f"noise scale {report.noise:.3g}")
    if report.output_scale is not None:
        parts.append(f"output scale {report.output_scale:.3g}")
    if report.component_nll is not None:
        parts.append(
            f"held-out NLL {report.component_nll:.3f} (point estimate {report.point_nll:.3f})"
        )
    if report.expected_nll is not None:
        total = report.negative_elbo
        parts.append(
            f"negative ELBO {total:.3f} = NLL {report.expected_nll:.3f} (of a sample of rows) + "
            f"KL {total - report.expected_nll:.3f}"
        )
    return ", ".join(parts)


def _loss(report: FitReport) -> str:
    point, loss = report.point, f"{report.last('loss'):.3f}"
    kl, nll = f"{report.last('kl'):.3f}", f"NLL {report.last('nll'):.3f}"
    unit = "nats per example"
    if point and report.last("loss") == report.last("nll"):
        return f"loss {loss} {unit}"
    if _is_laplace(report):
        penalty = report.last("loss") - report.last("nll")
        return f"loss {loss} = {nll} + penalty of the prior {penalty:.3f} {unit}"
    if point:  # it has a prior density instead of a KL
        return f"loss {loss} = {nll} + {report.temperature:g} x -log prior density {kl} {unit}"
    if report.temperature == 1:
        return f"negative ELBO {loss} = {nll} + KL {kl} {unit}"
    return f"loss {loss} = {nll} + {report.temperature:g} x KL {kl} {unit}"


def _is_laplace(report: FitReport) -> bool:
    """Whether the temperature is that of a point estimate only, the prior's weight."""
    return any(part.tau is not None for part in (report, *report.components))
