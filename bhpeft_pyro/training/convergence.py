"""Where a fit ended, whether its loss still fell, and where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..guides import Guide, latents
from ..model.model import Model
from ..priors import JOINT
from .elbo import ELBO, Parts
from .report import FitReport

_LEVEL = 0.05  # nats per example by which the loss may still fall
_FEW = 8  # products of which a mean and its standard error say little
_DRAWS = 256  # for a KL without a closed form


class Descent:
    """How fast the loss falls along the way that the optimiser takes, for any guide.

    The product of a gradient with the step before it, which other rows and weight draws chose, is
    negative on average while the loss falls, and 0 or positive around an optimum (Pflug 1983). In
    units of the learning rate it does not shrink with it.

    Args:
        steps: of the fit. Only the last half of them is looked at, so that the parameters are not
            copied in the first.
    """

    def __init__(self, steps: int) -> None:
        self._first, self._moves = steps // 2, 0
        self._slopes: list[float] = []
        self._moved: list[tuple[nn.Parameter, Tensor]] = []
        self._lr = self._way = 0.0

    @contextmanager
    def step(self, parameters: Sequence[nn.Parameter], lr: float, size: int) -> Iterator[None]:
        """Around an optimiser's step, with the gradients of the loss of `size` examples."""
        if self._lr > 0:
            products = [(p.grad * way).sum() for p, way in self._moved if p.grad is not None]
            self._slopes.append(sum(product.item() for product in products) / (self._lr * size))
        self._moves, self._way = self._moves + (lr > 0), self._way + lr
        if self._moves < self._first:
            yield
            return
        before = [(p, p.detach().clone()) for p in parameters]
        yield
        self._moved = [(p, p.detach() - at) for p, at in before]
        self._lr = lr

    def goes_on(self) -> bool:
        """Whether the loss would fall noticeably, to first order, if the fit went on as long again.
        From the last quarter of the steps, or the last half if they are few."""
        count = self._moves - 1  # the first has none before it
        last = self._slopes[-(count // 4 if count >= 4 * _FEW else count // 2) :]
        if len(last) < _FEW:
            return False
        falls = -self._way * torch.tensor(last)
        return bool(falls.mean() > _LEVEL + 2 * falls.std() / len(last) ** 0.5)


@torch.no_grad()
def mean_kl(guide: Guide, model: Model, batch: Batch, particles: int) -> dict[str, Tensor]:
    """The KL by site, over 256 draws where it has no closed form. The guide sees a batch as in
    training, and the network does not run."""
    elbo, values = ELBO(particles), list[dict[str, Tensor]]()
    for _ in range(1 if guide.point else -(-_DRAWS // particles)):
        elbo.differentiable_loss(lambda batch: model(), guide, batch)
        assert elbo.parts is not None
        values.append(elbo.parts.kl)
        if elbo.parts.kl == values[0] and len(values) > 1:
            break  # all of it has a closed form
    return {name: torch.stack([kl[name] for kl in values]).mean() for name in values[0]}


def note_end(report: FitReport, guide: Guide, model: Model, kls: Mapping[str, Tensor]) -> None:
    """Fill in where a fit ended, `kl`, `points` and `scales`, from the KL of each site. The KL is
    of each latent, if each has auxiliary variables of its own; or else of all."""
    before = {latent.name: latent.scale for latent in latents(model)}
    values = {name: value.item() for name, value in kls.items()}
    kl = {name: value for name, value in values.items() if name in before}
    for name in values.keys() - before.keys():
        latent = name.removesuffix("_unconstrained")  # of Pyro's AutoNormal
        if latent not in kl:
            kl = {JOINT: sum(values.values())}
            break
        kl[latent] += values[name]
    report.kl = kl
    report.points = [name for name in guide.points() if name in kl]
    report.scales = {
        name: (scale / before[name]).log().mean().exp().item()
        for name, scale in guide.scales().items()
    }


def culprit(guide: nn.Module, parts: Parts | None) -> str:
    """Name the first value found that is not finite: a parameter, a KL, the NLL or a gradient."""
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
        if not parts.evidence.isfinite():
            return "what the prior observes"
        if not parts.nll.isfinite():
            return "the likelihood (site 'label')"
    for name, parameter in params.items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the loss"
