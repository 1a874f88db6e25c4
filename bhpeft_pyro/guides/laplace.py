"""Linearised Laplace approximation: a trained point, and around it the curvature of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim import Optimizer

from ..checks import COUNT
from ..data.batch import Batch
from ..distributions import Covariance, LowRankNormal, base_of
from ..errors import GuideError
from ..model.model import Model
from ..options import FitOptions
from ..priors import JOINT, JointPrior, unpack
from .guide import Guide
from .latent import Latent, evidence, latents
from .optimizers import NOISE_STEPS, ScaledAdam, adam_lr

__all__ = ["LaplaceGuide"]

_BUFFERS = ("scale", "axes", "ratio")


class LaplaceGuide(Guide):
    """q(w) = N(w*, (tau P + N F)^-1) around a trained point w*, of the network linearised there.

    P is the prior's precision and F the generalised Gauss-Newton matrix of one example (MacKay
    1992; Immer, Korzepa and Bauer 2021). The leading directions of F are kept, and the diagonal of
    the rest. Several such guides make a mixture of Laplace approximations (Eschenhagen et al.
    2021), each around its own mode.

    The guide minimises a generalised variational objective (Knoblauch, Jewson and Damoulas 2022)
    of the linearised network f(w*) + J (w - w*). The KL to the prior N(m, P^-1) is split into a
    part that depends on the mean and one that depends on the covariance, and each has its own
    weight:

        N E_q[nll] + T / 2 (w* - m)' P (w* - m) + KL(N(0, S) || N(0, (tau P)^-1)).

    With T = tau = 1 this is the negative ELBO. SVI at temperature T trains the point by the first
    two terms. Given w*, the best S is known in closed form (to second order in the outputs):
    (tau P + N F)^-1. So `fit` or `Posterior.widen` computes it; it is not trained.

    T and tau affect one round and its predictions. The prior of the next round is the posterior
    with tau = 1, N(w*, (P + N F)^-1). After R rounds the precision is
    tau P + N_1 F_1 + ... + N_R F_R.

    Args:
        model: its prior is Normal at every site, or an earlier posterior of this guide.
        rank: the number of directions of F that are kept. Each takes one number a weight.

    Attributes:
        loc: (D,) the mean over all weights, in the order of the sites.
        prior: a Normal over the same vector.
        latent: the name under which the vector is sampled.
        measured: whether the covariance has been computed.
        tau: the multiple of the first prior's precision in the covariance.
        first_scale: (D,) sds of the first round's prior.

    Raises:
        GuideError: the prior is not an independent Normal at every site, or it has observations.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(())
    >>> options = {"components": 1, "max_steps": 3, "progress": False}
    >>> posterior = fit(model, "laplace", tiny_examples(), **options)
    >>> posterior.guide.scales()["head.bias"].shape
    torch.Size([2])
    """

    point = True
    joint = True
    own_mode = True
    pull = 0.1  # of an approximate posterior; as in online EWC the best weight is not 1

    def __init__(self, model: Model, rank: int = 16) -> None:
        super().__init__()
        self.rank = COUNT("LaplaceGuide: rank", rank, GuideError)
        self.follow(model)
        self._shapes: dict[str, tuple[int, ...]] = {}
        found = latents(model)
        for latent in found:
            self._shapes |= latent.sites or {latent.name: tuple(latent.loc.shape)}
        if missing := [site.name for site in model.sites if site.name not in self._shapes]:
            raise GuideError(
                f"LaplaceGuide: the prior does not sample {', '.join(missing)}; expected a Normal "
                "at every site; for other priors use 'normal'"
            )
        self._likelihood = {site.name for site in model.likelihood.sites}
        self.loc = nn.Parameter(torch.cat([latent.loc.flatten() for latent in found]).clone())
        start = self.prior.covariance
        for name in _BUFFERS:
            self.register_buffer(name, getattr(start, name))
        self.register_buffer("measured", torch.tensor(False))
        self.register_buffer("tau", torch.tensor(1.0))
        self.register_buffer("first_scale", start.scale.clone())
        self.scale: Tensor
        self.axes: Tensor
        self.ratio: Tensor
        self.measured: Tensor
        self.tau: Tensor
        self.first_scale: Tensor
        self._covariance = start

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Without a covariance it predicts with the network itself; with one, linearised."""
        return bool(self.measured)

    @property
    def covariance(self) -> Covariance:
        # Kept as one object, which remembers its divergence from a prior.
        if self._covariance.scale is not self.scale:  # loaded, copied or moved since
            self._covariance = Covariance(self.scale, self.axes, self.ratio)
        return self._covariance

    @covariance.setter
    def covariance(self, value: Covariance) -> None:
        self.scale, self.axes, self.ratio = value.scale, value.axes, value.ratio
        self._covariance = value

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        infer: Any = {"sites": self._shapes}
        if self.measured:
            normal = LowRankNormal(self.loc, self.covariance, validate_args=False)
            infer["is_auxiliary"] = not self._joint
            values = self.unpack(pyro.sample(self.latent, normal, infer=infer))
            return values if self._joint else self._sites(values)
        if not self._joint:
            return self._sites(self.unpack(self.loc))
        return self.unpack(pyro.sample(self.latent, dist.Delta(self.loc, event_dim=1), infer=infer))

    def _sites(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sites that make up a draw; under a joint prior the model makes them itself."""
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=len(self._shapes[name])))
            for name, value in values.items()
        }

    def follow(self, model: Model) -> None:
        found = latents(model)
        if others := [latent.name for latent in found if not (latent.is_site or latent.sites)]:
            raise GuideError(
                f"LaplaceGuide: the prior also samples {', '.join(others)}, on which its sites may "
                "depend; expected independent Normals; for other priors use 'normal'"
            )
        if seen := evidence(model):
            raise GuideError(
                f"LaplaceGuide: the prior has observations or factors, {', '.join(seen)}, which "
                "are not in its covariance; expected none; for such priors use 'normal'"
            )
        self.prior = _normal(found)
        self._joint = bool(found[0].sites)
        self.latent = found[0].name if self._joint else JOINT

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        # A rating's noise scale has far to go, from the sd of the ratings to that of the errors.
        sizes = 1 + (NOISE_STEPS - 1) * self.at(self._likelihood).to(self.loc)
        return [ScaledAdam(self.loc, sizes, adam_lr(options))]

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """`(*P, D)` to a tensor `(*P, *shape)` for each site."""
        return unpack(flat, self._shapes)

    def at(self, names: set[str]) -> Tensor:
        """(D,) whether a weight belongs to one of the sites `names`."""
        parts = self.unpack(self.loc.detach()).items()
        return torch.cat(
            [torch.full_like(part, n in names, dtype=torch.bool).flatten() for n, part in parts]
        )

    def means(self) -> dict[str, Tensor]:
        return self.unpack(self.loc.detach().clone())

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        by_site = self.unpack(values.get(self.latent, self.loc)) | dict(values)
        self.loc.copy_(torch.cat([by_site[name].flatten() for name in self._shapes]))

    def scales(self) -> dict[str, Tensor]:
        return self.unpack(self.covariance.variance.sqrt()) if self.measured else {}

    @torch.no_grad()
    def marginal_kl(self) -> dict[str, float]:
        """KL to the prior of each site's marginal, in nats.

        Under a prior with independent sites their sum is at most the KL: it lacks the correlations
        between sites, where the effect of one compensates that of another.
        """
        prior = JointPrior(self.prior, self._shapes)
        pairs = (
            (own.marginal([name]).normal for own in (self.as_prior(), prior))
            for name in self._shapes
        )
        return {
            name: kl_divergence(*pair).item()
            for name, pair in zip(self._shapes, pairs, strict=True)
        }

    def needs_held_out(self, options: FitOptions) -> bool:
        return super().needs_held_out(options) or options.tau is None

    def hold(self) -> None:
        self.measured.fill_(False)
        self.covariance = self.prior.covariance

    def spread(self, covariance: Covariance, tau: float = 1.0, noise: float = 1.0) -> None:
        """Take a covariance.

        Args:
            covariance: over all weights.
            tau: the multiple of the first prior's precision in it.
            noise: a factor for the ratings' noise scale.
        """
        if noise != 1:
            scale = self.means()["noise.log_scale"]
            self.move({"noise.log_scale": scale + math.log(noise)})
        self.covariance = covariance
        self.tau.fill_(tau)
        self.measured.fill_(True)

    def retune(self, tau: float, noise: float = 1.0) -> None:
        """Change tau, and multiply the ratings' noise scale by `noise`, around the same point."""
        own = retempered(self.covariance, self.first_scale, self.tau.item(), tau, noise**-2)
        self.spread(own, tau, noise)

    def own_prior(self) -> JointPrior:
        """The prior that this guide was fitted under; components of a mixture differ in it."""
        return JointPrior(self.prior, self._shapes, self.latent)

    def under(self, prior: JointPrior) -> LaplaceGuide:
        """The same guide for a model with another prior."""
        twin = copy.copy(self)
        twin.prior, twin._joint, twin.latent = prior.normal, True, prior.name
        return twin

    def for_predictions(self, prior: JointPrior) -> JointPrior:
        """A prior made from this posterior, with the guide's own tau in place of 1."""
        tau = self.tau.item()
        covariance = retempered(prior.normal.covariance, self.first_scale, 1.0, tau)
        return JointPrior(LowRankNormal(prior.normal.loc, covariance), self._shapes, prior.name)

    def prior_of_width(self, temperature: float) -> JointPrior:
        """The prior under which this guide is the posterior of the linearised network.

        In the first round it is N(w* + T / tau (m - w*), (tau P)^-1): its pull at w* is T times
        that of N(m, P^-1).
        """
        loc, own = self.loc.detach(), self.prior.covariance
        wide = retempered(own, self.first_scale, 1.0, self.tau.item())
        center = loc + temperature * wide.apply(own.solve(self.prior.loc - loc))
        return JointPrior(LowRankNormal(center, wide), self._shapes, self.latent)

    def centre(self, values: Mapping[str, Tensor]) -> JointPrior:
        parts = self.unpack(self.prior.loc) | dict(values)
        loc = torch.cat([parts[name].flatten() for name in self._shapes])
        return self.recentre(loc, self.prior.covariance)

    def recentre(self, loc: Tensor, covariance: Covariance) -> JointPrior:
        """Take N(loc, covariance) as the prior.

        Returns:
            The prior, for the model that the guide is to be fitted to.
        """
        normal = LowRankNormal(loc.clone(), covariance)
        self.prior, self._joint, self.first_scale = normal, True, covariance.scale.clone()
        if not self.measured:
            self.covariance = covariance
        return JointPrior(normal, self._shapes, self.latent)

    def as_prior(self) -> JointPrior:
        if not self.measured:
            raise GuideError(
                "this Laplace approximation is still a point estimate, which cannot be a prior: "
                "fit it with bh.fit, or call widen(data) on its posterior"
            )
        covariance = retempered(self.covariance, self.first_scale, self.tau.item(), 1.0)
        return JointPrior(
            LowRankNormal(self.loc.detach().clone(), covariance), self._shapes, self.latent
        )

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        old, root = self.covariance, self.tau.sqrt()
        # A column for each weight.
        parts = self.unpack(torch.cat([self.loc[None], old.scale[None], old.axes.mT]))
        first = self.unpack(self.first_scale)
        for name, (means, sds) in rows.items():
            axes = means.new_zeros(old.rank, *means.shape)
            more = torch.cat([means[None], (sds / root)[None], axes]).to(self.loc)
            parts[name] = torch.cat([parts[name], more], 1)
            first[name] = torch.cat([first[name], sds.to(first[name])])
        self._shapes = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        table = torch.cat([part.flatten(1) for part in parts.values()], 1)
        self.loc = nn.Parameter(table[0].clone())
        self.covariance = Covariance(table[1].clone(), table[2:].mT.contiguous(), old.ratio)
        self.first_scale = torch.cat([part.flatten() for part in first.values()])

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the guide and its prior, as every module's `_apply` does."""
        super()._apply(fn, recurse)
        loc = fn(self.prior.loc)
        if loc is not self.prior.loc:  # else it stays the object that the model's prior holds, too
            covariance = self.prior.covariance.map(fn)
            self.prior = LowRankNormal(loc, covariance, validate_args=False)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load as every module does; the number of directions may differ."""
        for name in _BUFFERS:
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, value.to(self.loc).clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _normal(found: Sequence[Latent]) -> LowRankNormal:
    """The prior of all latents as one Normal."""
    if not found:
        raise GuideError("LaplaceGuide: the model has no random weights; expected some")
    if len(found) == 1 and isinstance(normal := found[0].prior, LowRankNormal):
        return normal
    parts = []
    for latent in found:
        base = base_of(latent.prior)
        if not isinstance(base, Normal):
            raise GuideError(
                f"LaplaceGuide: the prior of {latent.name!r} is a {type(base).__name__}, expected "
                "a Normal; for other priors use 'normal' or one of Pyro's guides"
            )
        shape = latent.loc.shape
        parts.append([x.to(latent.loc).expand(shape).flatten() for x in (base.loc, base.scale)])
    locs, scales = zip(*parts, strict=True)
    return LowRankNormal(torch.cat(locs), Covariance.diagonal(torch.cat(scales)))


def retempered(
    covariance: Covariance, first_scale: Tensor, old: float, new: float, times: float = 1.0
) -> Covariance:
    """The covariance of precision new P + times (Q - old P), given that of precision Q.

    P is the first prior's precision, so Q - old P is what the data contributed.
    """
    if new == old and times == 1:
        return covariance
    first = first_scale.pow(-2)
    learnt = (covariance.scale.pow(-2) - old * first).clamp_min(0)
    root = times**0.5 * covariance.precision_root()
    return Covariance.from_precision(new * first + times * learnt, root)
