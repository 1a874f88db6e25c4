"""Guides with independent weights: Normal, or point estimates (ordinary fine-tuning); and their
optimisers: natural gradients for Normals, and Adam with step sizes by weight.

With one learning rate for means and sds, the sds hardly leave their initial values. With two, steps
of equal size on every weight add thousands of nats of KL without need. Natural-gradient steps are
in units of the posterior's own sds, which solves both problems.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.optim import Adam, Optimizer

from ..base.fit_options import FitOptions
from ..base.values import PartialShare, Positive, checked_call
from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from .guide import NOISE_STEPS, Guide, adam_lr, key
from .latent import Latent, check_separate, is_real, latents, normal_on

_TRUST = 0.2  # largest change of a log precision per step


class _Located(Guide):
    """A guide with a location for each latent, in unconstrained coordinates."""

    def __init__(self, covered: Sequence[Latent]) -> None:
        super().__init__()
        check_separate(type(self).__name__, covered)
        self._supports = {latent.name: latent.support for latent in covered}
        self.loc = nn.ParameterDict()
        for latent in covered:
            self.loc[key(latent.name)] = nn.Parameter(latent.loc)

    def means(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._values().items()}

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        for name in self._supports.keys() & values.keys():
            inverse = biject_to(self._supports[name]).inv
            self.loc[key(name)].copy_(inverse(values[name]))

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        return [self.loc[key(name)] for name in self._supports if name in sites]

    def _values(self) -> dict[str, Tensor]:
        return {
            name: biject_to(support)(self.loc[key(name)])
            for name, support in self._supports.items()
        }


class NormalGuide(_Located):
    """q(w) = prod_i N(w_i | loc_i, scale_i^2), the paper's variational family.

    Each site is sampled from a Normal (Pyro's AutoNormal samples an auxiliary site and a Delta), so
    the KL to a Normal prior has a closed form and adds no noise to the loss. Latents that are not
    real-valued are Normal in unconstrained coordinates.

    Args:
        model: the model whose latents it covers.
        init_scale: the initial sd of every weight. By default sds start at the prior's, and `fit`
            first fits the head and sets the sds of a diagonal Laplace approximation; with an
            `init_scale` it does not.
        names: the latents it covers; by default all.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> NormalGuide(tiny_model()).distributions()["head.bias"].event_shape
    torch.Size([2])
    """

    @checked_call
    def __init__(
        self, model: Model, init_scale: Positive | None = None, names: Collection[str] | None = None
    ) -> None:
        covered = latents(model, names)
        super().__init__(covered)
        self.init_scale = init_scale
        self.log_scale = nn.ParameterDict()
        for latent in covered:
            scale = latent.scale if init_scale is None else torch.full_like(latent.loc, init_scale)
            self.log_scale[key(latent.name)] = nn.Parameter(scale.log())

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {
            name: pyro.sample(
                name, normal_on(support, self.loc[key(name)], self.log_scale[key(name)].exp())
            )
            for name, support in self._supports.items()
        }

    def distributions(self) -> dict[str, TorchDistribution]:
        return {
            name: normal_on(self._supports[name], self.loc[key(name)].detach().clone(), scale)
            for name, scale in self.scales().items()
        }

    def scales(self) -> dict[str, Tensor]:
        return {name: self.log_scale[key(name)].detach().exp() for name in self._supports}

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        tables = (self.loc, self.log_scale)
        return [table[key(name)] for table in tables for name in self._supports if name in sites]

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        pairs = [(self.loc[key(name)], self.log_scale[key(name)]) for name in self._supports]
        return [NaturalGradient(pairs, lr=natural_lr(options, examples))]

    def free_sds(self) -> bool:
        return self.init_scale is None

    @torch.no_grad()
    def narrow(self, information: Mapping[str, Tensor]) -> None:
        if self.init_scale is not None:
            return
        for name, more in information.items():
            if is_real(self._supports.get(name)):
                log_scale = self.log_scale[key(name)]
                log_scale.copy_((torch.exp(-2 * log_scale) + more).log() / -2)

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (means, sds) in rows.items():
            for table, more in ((self.loc, means), (self.log_scale, sds.log())):
                old = table[key(name)]
                table[key(name)] = nn.Parameter(torch.cat([old, more.to(old)]))

    def options(self) -> dict[str, Any]:
        return {"init_scale": self.init_scale}


class DeltaGuide(_Located):
    """A point estimate: at temperature 1 MAP, at temperature 0 maximum likelihood (ordinary
    fine-tuning).

    Args:
        model: the model whose latents it covers.
        width: the sd, in the sites' units, of the next round's prior, a Normal around the point
            estimate. It limits how far a round moves the weights; it is not estimated from data.
            Without it the guide cannot become a prior.
        names: the latents it covers; by default all.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> sorted(DeltaGuide(tiny_model())())[-2:]
    ['lora.value.A', 'lora.value.B']
    """

    point = True

    @checked_call
    def __init__(
        self, model: Model, width: Positive | None = None, names: Collection[str] | None = None
    ) -> None:
        covered = latents(model, names)
        super().__init__(covered)
        self.width = width
        self._likelihood = {site.name for site in model.likelihood.sites}
        self._units = {latent.name: latent.unit for latent in covered}

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
            for name, value in self._values().items()
        }

    def distributions(self) -> dict[str, TorchDistribution]:
        if self.width is None:
            raise GuideError(
                "a point estimate has no width, so it cannot be a prior: fit 'laplace' or "
                "'normal'; in Python, widen it (posterior.widen(data)), or give the 'delta' guide "
                "a width=... (the sd of the next round's prior, in the sites' units), or continue "
                "from this estimate without a prior: "
                "fit(posterior.model, copy.deepcopy(posterior.guide), data, temperature=0.0)"
            )
        locs = {name: self.loc[key(name)].detach().clone() for name in self._supports}
        return {
            name: normal_on(self._supports[name], loc, self.width * self._units[name].to(loc))
            for name, loc in locs.items()
        }

    def set_prior(self, model: Model) -> None:
        self._units = {latent.name: latent.unit for latent in latents(model)}

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        lr = adam_lr(options)
        noise = self.parameters_of(self._likelihood)
        rest = self.parameters_of(self._supports.keys() - self._likelihood)
        groups = [(rest, lr), (noise, NOISE_STEPS * lr)]  # a report has the first one's rate
        return [Adam(group, lr=rate) for group, rate in groups if group]

    def options(self) -> dict[str, Any]:
        return {"width": self.width}


class NaturalGradient(Optimizer):
    """The improved Bayesian learning rule of Lin, Schmidt and Khan (2020) on (loc, log scale).

    With u = log scale, precision P = exp(-2u), the loss L = N E[nll] + KL in nats, and
    h = (dL/du) P minus its natural gradient with respect to the precision, the rule reads

        P   <- P + lr h + (lr h)^2 / (2 P) + ...  =  P exp(lr h / P),   that is
        u   <- u - lr (dL/du) / 2
        loc <- loc - lr (dL/dloc) / P

    Lin et al. stop at the second order, and then noise in the gradient shrinks the sds (measured: a
    bias' sd of 0.03 in place of 0.13); with all orders it does not. Both gradients are first
    averaged over steps (`momentum` for loc, `averaging` for u). One step moves a loc by at most its
    own sd, and an sd by at most 10 %: larger steps from a start that is too wide, where gradients
    are mostly noise, leave some sds near zero and their locs far off.

    Args:
        pairs: (loc, log scale) parameters of equal shape.
        lr: the step size; 1 jumps to the optimum of a quadratic.
        momentum: exponential averaging of the gradient of loc.
        averaging: exponential averaging of the gradient of log scale.

    >>> loc, log_scale = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> optimiser = NaturalGradient([(loc, log_scale)], lr=0.5, momentum=0.0, averaging=0.0)
    >>> for _ in range(50):  # KL(N(loc, scale^2) || N(3, 0.1^2))
    ...     scale = log_scale.exp()
    ...     loss = ((loc - 3) ** 2 + scale**2) / 0.02 - log_scale
    ...     optimiser.zero_grad(); loss.sum().backward(); optimiser.step()
    >>> round(loc.item(), 3), round(log_scale.exp().item(), 3)
    (3.0, 0.1)
    """

    @checked_call
    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: Positive = 0.1,
        momentum: PartialShare = 0.9,
        averaging: PartialShare = 0.9,
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": list(pair)} for pair in pairs]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "averaging": averaging})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all pairs that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            loc, log_scale = group["params"]
            if loc.grad is None or log_scale.grad is None:
                continue
            state = self.state[loc]
            if not state:
                state["step"] = 0
                state["loc"] = torch.zeros_like(loc)
                state["log_scale"] = torch.zeros_like(log_scale)
            state["step"] += 1
            slope = average(state["loc"], loc.grad, group["momentum"], state["step"])
            bend = average(state["log_scale"], log_scale.grad, group["averaging"], state["step"])
            log_scale.sub_((group["lr"] * bend).clamp_(-_TRUST, _TRUST), alpha=0.5)
            scale = log_scale.exp()
            loc.sub_((group["lr"] * scale * slope).clamp_(-1, 1).mul_(scale))
        return loss


def average(buffer: Tensor, gradient: Tensor, decay: float, step: int) -> Tensor:
    """Exponential average with Adam's correction for the start at zero."""
    buffer.lerp_(gradient, 1 - decay)
    return buffer / (1 - decay**step)


class ScaledAdam(Adam):
    """Adam (Kingma and Ba 2015) with a step size for each weight: `lr` times `sizes`, (D,)."""

    def __init__(self, weights: nn.Parameter, sizes: Tensor, lr: float) -> None:
        self.weights, self.sizes = weights, sizes
        self.start = weights.detach().clone()
        self.moved = nn.Parameter(torch.zeros_like(self.start))  # in units of `sizes`
        super().__init__([self.moved], lr=lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.weights.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights."""
        assert self.weights.grad is not None
        self.moved.grad = self.sizes * self.weights.grad
        loss = super().step(closure)
        self.weights.copy_(self.start + self.sizes * self.moved)
        return loss


def natural_lr(options: FitOptions, examples: int) -> float:
    """The step size of `NaturalGradient`.

    With step size rho and batches of B out of N examples, the mean has a variance of rho N / (2 B)
    posterior variances, so rho is B / N by default, at most 0.1. A temperature T < 1 makes the
    posterior's sds smaller by sqrt(T), so rho is divided by T.
    """
    if options.lr is not None:
        return options.lr
    cold = min(options.temperature or 1.0, 1.0)
    return min(options.batch_size / examples, 0.1) / cold
