"""Guides with independent weights: Normal, or point estimates (ordinary fine-tuning); and their
optimisers: natural gradients for Normals, and Adam with step sizes by weight.

With one learning rate for means and sds, the sds hardly leave their initial values. With two, steps
of equal size on every weight add thousands of nats of KL without need. Natural-gradient steps are
in units of the posterior's own sds, which solves both problems.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.optim import Adam, Optimizer

from ..base.fit_options import FitOptions
from ..base.names import sort_by_pattern
from ..base.values import PartialShare, Positive, checked_call, valid
from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from .guide import NOISE_STEPS, Guide, adam_lr, key
from .latent import check_separate, is_real, latents, normal_on

_TRUST = 0.2  # largest change of a log precision per step


FAMILIES = {"normal": "init_scale", "delta": "width"}
"""The families of a `MeanFieldGuide`, and the option of each."""
Family = str | tuple[str, Mapping[str, Any]]
"""The name of a family, or a pair of a name and its option."""


class MeanFieldGuide(Guide):
    """q(w) = prod_i q_i(w_i): each latent is Normal or a point estimate.

    With Normals alone this is the paper's variational family. Each is sampled from a Normal (Pyro's
    AutoNormal samples an auxiliary site and a Delta), so the KL to a Normal prior has a closed form
    and adds no noise to the loss. Latents that are not real-valued are Normal in unconstrained
    coordinates.

    A point estimate has no KL. It adds minus its log prior density to the loss, so it is a MAP
    estimate given draws of the other latents; with points alone and at temperature 0 it is maximum
    likelihood (ordinary fine-tuning).

    Args:
        model: the model whose latents it covers.
        families: "normal" or "delta"; a pair of such a name and its option; or a mapping from
            patterns of names to these, of which the first that matches a latent is used. Latents
            that are not sites, such as scales, are matched by their own names. The options are

            * `init_scale` of "normal": the initial sd of every weight. By default sds start at the
              prior's, and `fit` first fits the head and sets the sds of a diagonal Laplace
              approximation; with an `init_scale` it does not.
            * `width` of "delta": the sd, in the sites' units, of the next round's prior, a Normal
              around the point estimate. It limits how far a round moves the weights; it is not
              estimated from data. Without it the guide cannot become a prior.

    Raises:
        GuideError: a family or an option is unknown; no pattern matches a latent, or a pattern
            matches none; or the prior samples several sites jointly.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> MeanFieldGuide(tiny_model()).distributions()["head.bias"].event_shape
    torch.Size([2])
    >>> MeanFieldGuide(tiny_model(), {"lora.*.A": "normal", "*": "delta"}).title()
    'MeanFieldGuide(lora.*.A: normal, *: delta)'
    """

    def __init__(self, model: Model, families: Family | Mapping[str, Family] = "normal") -> None:
        super().__init__()
        covered = latents(model)
        check_separate(type(self).__name__, covered)
        self.families = families
        by_pattern = families if isinstance(families, Mapping) else {"*": families}
        parsed = {pattern: _parsed(pattern, family) for pattern, family in by_pattern.items()}
        names = [latent.name for latent in covered]
        pattern_of = sort_by_pattern(names, by_pattern, "guide", GuideError)
        self._families = {name: parsed[pattern_of[name]] for name in names}
        self._supports = {latent.name: latent.support for latent in covered}
        self._units = {latent.name: latent.unit for latent in covered}
        self._likelihood = {site.name for site in model.likelihood.sites}
        self.loc, self.log_scale = nn.ParameterDict(), nn.ParameterDict()
        for latent in covered:
            family, option = self._families[latent.name]
            self.loc[key(latent.name)] = nn.Parameter(latent.loc)
            if family == "normal":
                sd = latent.scale if option is None else torch.full_like(latent.loc, option)
                self.log_scale[key(latent.name)] = nn.Parameter(sd.log())

    def _of(self, family: str) -> list[str]:
        """The latents of a family."""
        return [name for name, (own, _) in self._families.items() if own == family]

    @property
    def point(self) -> bool:  # type: ignore[override]
        """Whether every latent is a point estimate."""
        return not self._of("normal")

    def points(self) -> list[str]:
        return self._of("delta")

    def title(self) -> str:
        by_pattern = self.families if isinstance(self.families, Mapping) else {"": self.families}
        lines = []
        for pattern, family in by_pattern.items():
            name, options = (family, {}) if isinstance(family, str) else family
            listed = ", ".join(f"{option}={value!r}" for option, value in options.items())
            name = f"{name}({listed})" if listed else name
            lines.append(f"{pattern}: {name}" if pattern else name)
        return f"{type(self).__name__}({', '.join(lines)})"

    def options(self) -> dict[str, Any]:
        return {"families": self.families}

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        drawn = {}
        for name, (family, _) in self._families.items():
            loc, support = self.loc[key(name)], self._supports[name]
            if family == "normal":
                fn = normal_on(support, loc, self.log_scale[key(name)].exp())
            else:
                fn = dist.Delta(biject_to(support)(loc), event_dim=loc.dim())
            drawn[name] = pyro.sample(name, fn)
        return drawn

    def means(self) -> dict[str, Tensor]:
        return {
            name: biject_to(support)(self.loc[key(name)]).detach().clone()
            for name, support in self._supports.items()
        }

    def scales(self) -> dict[str, Tensor]:
        return {name: self.log_scale[key(name)].detach().exp() for name in self._of("normal")}

    def distributions(self) -> dict[str, TorchDistribution]:
        normals, sds = dict[str, TorchDistribution](), self.scales()
        for name, (_, width) in self._families.items():
            loc, sd = self.loc[key(name)].detach().clone(), sds.get(name)
            if sd is None and width is None:
                raise GuideError(
                    "a point estimate has no width, so it cannot be a prior: fit 'laplace' or "
                    "'normal'; in Python, widen it (posterior.widen(data)), or give the 'delta' "
                    "guide a width=... (the sd of the next round's prior, in the sites' units), or "
                    "continue from this estimate without a prior: "
                    "fit(posterior.model, copy.deepcopy(posterior.guide), data, temperature=0.0)"
                )
            if width is not None and sd is None:
                sd = width * self._units[name].to(loc)
            assert sd is not None
            normals[name] = normal_on(self._supports[name], loc, sd)
        return normals

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        for name in self._supports.keys() & values.keys():
            inverse = biject_to(self._supports[name]).inv
            self.loc[key(name)].copy_(inverse(values[name]))

    def set_prior(self, model: Model) -> None:
        self._units = {latent.name: latent.unit for latent in latents(model)}

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        tables = (self.loc, self.log_scale)
        names = [key(name) for name in self._families if name in sites]
        return [table[name] for table in tables for name in names if name in table]

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        normal, points = self._of("normal"), self._of("delta")
        steppers: list[Optimizer] = []
        if normal:
            pairs = [(self.loc[key(name)], self.log_scale[key(name)]) for name in normal]
            steppers.append(NaturalGradient(pairs, lr=natural_lr(options, examples)))
        if points:
            lr, noise = adam_lr(options), self._likelihood
            rest = self.parameters_of({name for name in points if name not in noise})
            groups = [(rest, lr), (self.parameters_of(noise & {*points}), NOISE_STEPS * lr)]
            steppers += [Adam(group, lr=rate) for group, rate in groups if group]
        return steppers  # a report has the first one's rate

    def free_sds(self) -> bool:
        return any(family == ("normal", None) for family in self._families.values())

    @torch.no_grad()
    def narrow(self, information: Mapping[str, Tensor]) -> None:
        for name, more in information.items():
            free = self._families.get(name) == ("normal", None)
            if free and is_real(self._supports[name]):
                log_scale = self.log_scale[key(name)]
                log_scale.copy_((torch.exp(-2 * log_scale) + more).log() / -2)

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        if points := rows.keys() & {*self._of("delta")}:
            raise GuideError(
                f"grow: point estimates cannot get new rows of {', '.join(sorted(points))}; "
                "expected a 'normal' or 'laplace' guide for them"
            )
        for name, (means, sds) in rows.items():
            for table, more in ((self.loc, means), (self.log_scale, sds.log())):
                old = table[key(name)]
                table[key(name)] = nn.Parameter(torch.cat([old, more.to(old)]))


def _parsed(pattern: str, family: Any) -> tuple[str, float | None]:
    """The name of a family, and its option if it is given."""
    match family:
        case str(name):
            options: Mapping[str, Any] = {}
        case (str(name), Mapping() as options):
            pass
        case _:
            raise GuideError(
                f"guide: got {family!r} at {pattern!r}, expected a family's name, or a pair of a "
                "name and a mapping of options"
            )
    if name not in FAMILIES:
        raise GuideError(
            f"guide: unknown family {name!r} at {pattern!r}; expected one of {', '.join(FAMILIES)}"
        )
    option = FAMILIES[name]
    if options.keys() - {option}:
        raise GuideError(f"{name!r} does not take {dict(options)}; expected no option but {option}")
    value = options.get(option)
    return name, None if value is None else valid(Positive, option, value)


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
