"""What is noted of a fit as it runs: how the sds move, and where numbers are no longer finite."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..guides import Guide, LowRankGuide, NormalGuide, latents
from ..guides.guide import blocks_of
from ..model.model import Model
from .elbo import Parts
from .report import FitReport, drifting, unsettled

__all__ = [
    "Watch",
    "culprit",
]


class Watch:
    """The sds of a guide's blocks on their way.

    Args:
        guide: any; of guides that are not this package's nothing is noted.
    """

    def __init__(self, guide: nn.Module) -> None:
        self._blocks = list(blocks_of(guide))
        self._slopes: dict[str, list[tuple[int, Tensor]]] = {}
        self._widths: dict[str, list[float]] = {}  # mean log sds at each measurement

    def slopes(self, step: int) -> None:
        """Note the gradients by log sd, after the loss of a step went backwards."""
        for block in self._blocks:
            if isinstance(block, NormalGuide):
                for name, slope in block.scale_slopes().items():
                    self._slopes.setdefault(name, []).append((step, slope))

    def widths(self, block: LowRankGuide) -> None:
        """Note the sds of a covariance just measured."""
        for name, scale in block.scales().items():
            self._widths.setdefault(name, []).append(scale.log().mean().item())

    def summarise(self, model: Model, parts: Parts, report: FitReport) -> None:
        """Say in the report where KLs and sds ended."""
        report.kl = {name: value.item() for name, value in parts.kl.items()}
        report.marginal_kl = {
            name: value
            for block in self._blocks
            if isinstance(block, LowRankGuide) and not block.point
            for name, value in block.marginal_kl().items()
        }
        report.points = [
            name
            for block in self._blocks
            if isinstance(block, Guide) and block.point
            for name in block.means()
            if name in report.kl
        ]
        report.scales = {
            name: (after / before).log().mean().exp().item()
            for name, before, after in self._sds(model)
        }
        # Of the state that is kept, and the quarter of the way before it.
        end = report.best_step or report.steps
        last = {
            name: [slope for step, slope in noted if end * 3 // 4 < step <= end]
            for name, noted in self._slopes.items()
        }
        slopes = unsettled({k: v for k, v in last.items() if v}, report.temperature)
        report.unsettled = [*slopes, *drifting(self._widths)]

    def _sds(self, model: Model) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Those of the prior and of the posterior, per site."""
        for block in self._blocks:
            if isinstance(block, LowRankGuide) and not block.point:
                before = block.unpack(block.prior.variance.sqrt())
            elif isinstance(block, NormalGuide):
                before = {latent.name: latent.scale for latent in latents(model)}
            else:
                continue
            for name, after in block.scales().items():
                yield name, before[name], after


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
