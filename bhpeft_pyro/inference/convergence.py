"""How the sds move during a fit, and where numbers stop being finite."""

from __future__ import annotations

from torch import Tensor, nn

from ..guides import Guide, latents
from ..model.model import Model
from .elbo import Parts
from .report import FitReport, unsettled

__all__ = ["Watch", "culprit"]


class Watch:
    """Records how a guide's sds move.

    Args:
        guide: any; nothing is recorded of guides that are not this package's.
    """

    def __init__(self, guide: nn.Module) -> None:
        self._guide = guide if isinstance(guide, Guide) else None
        self._slopes: dict[str, list[tuple[int, Tensor]]] = {}

    def slopes(self, step: int) -> None:
        """Record the gradients by log sd, after the loss of a step was backpropagated."""
        if self._guide is not None:
            for name, slope in self._guide.scale_slopes().items():
                self._slopes.setdefault(name, []).append((step, slope))

    def summarise(self, model: Model, parts: Parts, report: FitReport) -> None:
        """Put the final KLs and sds into the report."""
        report.kl = {name: value.item() for name, value in parts.kl.items()}
        if self._guide is None:
            return
        report.points = [name for name in self._guide.points() if name in report.kl]
        after = self._guide.scales()
        before = {latent.name: latent.scale for latent in latents(model)} if after else {}
        report.scales = {
            name: (scale / before[name]).log().mean().exp().item() for name, scale in after.items()
        }
        # Of the state that is kept, and the quarter of the steps before it.
        end = report.best_step or report.steps
        last = {
            name: [slope for step, slope in noted if end * 3 // 4 < step <= end]
            for name, noted in self._slopes.items()
        }
        report.unsettled = unsettled({k: v for k, v in last.items() if v}, report.temperature)


def culprit(guide: nn.Module, parts: Parts | None) -> str:
    """Where the first value that is not finite is."""
    params = {
        f"the guide's {name.replace('/', '.')}": parameter
        for name, parameter in guide.named_parameters()
    }
    for name, parameter in params.items():
        if not parameter.isfinite().all():
            return name
    if parts is not None:
        for name, kl in parts.kl.items():
            if not kl.isfinite():
                return f"the KL of site {name!r}"
        if not parts.nll.isfinite():
            return "the likelihood (site 'label')"
    for name, parameter in params.items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the loss"
