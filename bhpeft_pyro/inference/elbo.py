"""The loss: N * E[nll] + temperature * KL, with its two parts kept apart.

Weight draws from a fitted guide.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from ..distributions import Covariance, LowRankNormal, base_of
from ..errors import ConfigError, GuideError
from ..guides import Guide
from ..guides.guide import components_of
from ..model.model import Model
from ..priors import apart, complete

__all__ = [
    "ELBO",
    "PLATE",
    "Parts",
    "alone",
    "blocks",
    "completed",
    "draw",
    "point",
    "sampling",
    "seeded",
    "strata",
    "traces",
]

_LOCK = threading.RLock()


@contextmanager
def sampling() -> Iterator[None]:
    """Pyro and the random state to oneself: both are global, so one thread at a time may sample."""
    with _LOCK:
        yield


PLATE = "draws"
_BLOCK = 16  # draws made at a time


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set to `seed`, and put back at the end."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def draw(model: Model, guide: Callable[..., Any], samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Joint draws of every latent, and of the sites made out of them.

    Args:
        model: the model, whose prior may make sites out of other latents.
        guide: any Pyro guide; it is called with None for a batch.
        samples: S; of a mixture rounded up, so that each component gives as many (`strata`).
        seed: makes the draws repeatable; the global random state is left alone.

    Returns:
        Site name to a detached (S, 1, *site shape) tensor: the 1 is the data plate's place. Those
        of a mixture are in the order of its components.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    parts = list(blocks(model, guide, samples, seed))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def blocks(
    model: Model, guide: Callable[..., Any], samples: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The draws of `draw`, some at a time, so that not all need be held at once."""
    seeds = torch.Generator().manual_seed(seed)
    for component, share in strata(guide, samples):
        yield from completed(model, component, share, seeds)


def completed(
    model: Model, guide: Callable[..., Any], samples: int, seeds: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Draws of one component, with the sites that the prior makes out of them."""
    for trace in traces(guide, samples, seeds):
        latents = {name: value.detach() for name, value in apart(trace).items()}
        with alone():
            whole = complete(model.prior, model.sites, latents)
        yield whole


def strata(guide: Callable[..., Any], samples: int) -> list[tuple[Callable[..., Any], int]]:
    """The components of a mixture with the draws that each gives, equally many and `samples` at
    least in all; of any other guide itself with all of them."""
    components = components_of(guide)
    share = -(-samples // len(components))
    return [(component, share) for component in components]


def traces(
    guide: Callable[..., Any], samples: int, seeds: torch.Generator
) -> Iterator[poutine.Trace]:
    """Traces of a guide: (s, 1) draws of every site under a plate of the name `PLATE`."""
    for start in range(0, samples, _BLOCK):
        own = int(torch.randint(2**62, (), generator=seeds))
        with (
            alone(),
            seeded(own),
            poutine.trace() as tracer,
            pyro.plate(PLATE, min(_BLOCK, samples - start), dim=-2),
        ):
            guide(None)
        yield tracer.trace


@contextmanager
def alone() -> Iterator[None]:
    """Pyro to oneself: one thread, no gradients, no outer handlers, no global parameters."""
    with sampling(), torch.no_grad(), pyro.get_param_store().scope(), poutine.block():
        yield


def point(model: Model, guide: Callable[..., Any]) -> dict[str, Tensor]:
    """A guide's central values as a single draw, (1, 1, *site shape)."""
    if isinstance(guide, Guide):
        means = guide.means()
    elif isinstance(guide, AutoGuide):
        with sampling(), torch.no_grad(), pyro.get_param_store().scope():
            means = guide.median(None)
    else:
        raise GuideError(
            f"samples=0 and linear=True ask for the guide's central values, which "
            f"{type(guide).__name__} does not tell; give samples=1 or more, and linear=False"
        )
    with alone():
        return complete(model.prior, model.sites, {k: v[None, None] for k, v in means.items()})


@dataclass
class Parts:
    """What the last evaluation of the loss was made of, in nats for the whole data set."""

    nll: Tensor
    kl: dict[str, Tensor] = field(default_factory=dict)  # by site


class ELBO(TraceMeanField_ELBO):
    """Negative evidence lower bound of reparameterised guides, in nats for the whole data set.

    As Pyro's `TraceMeanField_ELBO` (closed-form KL where there is one, Monte Carlo otherwise), and
    besides: the KL is weighted by `temperature` whatever its form; nll and KL by site are kept in
    `parts`; a KL that is the same for every particle is computed once; the log-density that a
    Delta carries for a transformed latent counts.

    Args:
        num_particles: weight draws per evaluation, run together; with a batch that is
            `split` as often they share its examples out.
        temperature: weight of the KL; 1 for the posterior, 0 for maximum likelihood.

    >>> from bhpeft_pyro.testing import tiny_batch, tiny_model
    >>> from bhpeft_pyro.guides import NormalGuide
    >>> model = tiny_model()
    >>> loss = ELBO(num_particles=2)(model, NormalGuide(model))   # an nn.Module
    >>> loss(tiny_batch(4).split(2)).requires_grad
    True
    """

    def __init__(self, num_particles: int = 1, temperature: float = 1.0) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        self.temperature = temperature
        self.parts: Parts | None = None
        self._priors: dict[str, Covariance] = {}

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        if is_validation_enabled():
            _check_reparameterised(guide_trace)
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace, model_trace = map(prune_subsample_sites, (guide_trace, model_trace))
        # Only what has no closed form needs a log-probability.
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        return model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[float, Tensor]:
        nodes: dict[str, Any] = model_trace.nodes
        guide_nodes: dict[str, Any] = guide_trace.nodes
        nll = torch.zeros(())
        kl: dict[str, Tensor] = {}
        done: set[str] = set()
        for name, site in guide_nodes.items():
            if (value := self._joint_kl(name, site, nodes)) is not None:
                kl[name] = value
                done |= {name, *site["infer"]["sites"]}
        for name, site in nodes.items():
            if site["type"] != "sample" or name in done:
                continue
            if site["is_observed"]:
                nll = nll - site["log_prob_sum"]
            elif name not in guide_nodes:
                raise GuideError(f"guide: it does not sample the site {name!r}")
            else:
                kl[name] = _kl(guide_nodes[name], site)
        for name, site in guide_nodes.items():
            if site["type"] == "sample" and name not in nodes and name not in done:
                if not site["infer"].get("is_auxiliary"):
                    raise GuideError(
                        f"guide: it samples {name!r}, which the model has not; mark what is "
                        "auxiliary with infer={'is_auxiliary': True}"
                    )
                kl[name] = value = _log_prob(site)
                if value.requires_grad and not site["fn"].has_rsample:
                    raise _no_gradient(name, site)  # noise that nothing is learnt about is fine
        loss = nll + self.temperature * sum(kl.values())
        scale = 1.0 / self.num_particles
        self.parts = Parts(
            nll.detach() * scale,
            {name: value.detach() * scale for name, value in kl.items()},
        )
        return loss.item(), loss

    def _joint_kl(
        self, name: str, guide_site: dict[str, Any], nodes: dict[str, Any]
    ) -> Tensor | None:
        """The KL of a Normal over several sites to independent Normals, if it is one."""
        q = guide_site.get("fn")
        if name in nodes or not isinstance(q, LowRankNormal):
            return None
        priors = [
            _single(nodes[part]["fn"], len(q.batch_shape))
            for part in guide_site["infer"].get("sites", ())
            if part in nodes
        ]
        if not priors or any(prior is None for prior in priors):
            return None
        loc, scale = (
            torch.cat([tensor.flatten() for tensor in tensors])
            for tensors in zip(*filter(None, priors), strict=True)
        )
        if loc.shape != q.event_shape:
            return None
        prior = self._priors.get(name)
        if prior is None or not torch.equal(prior.scale, scale):
            # Kept: divergences are remembered by object.
            prior = self._priors[name] = Covariance.diagonal(scale)
        value = kl_divergence(q, LowRankNormal(loc, prior, q.batch_shape, False))
        return value.sum() * guide_site["scale"]


def _single(distribution: Distribution, lead: int) -> tuple[Tensor, Tensor] | None:
    """Mean and sd of a Normal that is the same along its `lead` first dims, without these."""
    base = base_of(distribution)
    if not isinstance(base, Normal) or len(distribution.batch_shape) != lead:
        return None
    tensors = base.loc.expand(base.batch_shape), base.scale.expand(base.batch_shape)
    shape = base.batch_shape[:lead]
    if any(
        stride and size > 1
        for t in tensors
        for stride, size in zip(t.stride(), shape, strict=False)
    ):
        return None
    loc, scale = (tensor[(0,) * lead] for tensor in tensors)
    return loc, scale


def _kl(guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
    q, p = guide_site["fn"], model_site["fn"]
    # Pyro's KL from a Delta leaves out its log-density (the Jacobian of a transformed latent).
    if not isinstance(base_of(q), Delta):
        mask, copies = guide_site["mask"], 1
        if mask is None:
            q, p, copies = _once(q, p)
        try:
            return scale_and_mask(kl_divergence(q, p), copies * guide_site["scale"], mask).sum()
        except NotImplementedError:
            pass
    return _log_prob(guide_site) - _log_prob(model_site)


def _log_prob(site: dict[str, Any]) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()


def _check_reparameterised(guide_trace: poutine.Trace) -> None:
    """Gradients go through draws: others would be wrong, and nothing else would tell."""
    nodes: dict[str, Any] = dict(guide_trace.iter_stochastic_nodes())
    for name, node in nodes.items():
        if not (node["fn"].has_rsample or node["infer"].get("is_auxiliary")):
            raise _no_gradient(name, node)


def _no_gradient(name: str, node: dict[str, Any]) -> GuideError:
    return GuideError(
        f"guide: a {type(base_of(node['fn'])).__name__} at {name!r} cannot be reparameterised "
        "(has_rsample), so its draws have no gradient; expected a distribution with one, such as "
        "a Normal"
    )


def _once(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int]:
    """Two Normals without the leading particle dims along which both are mere repetitions."""
    dims = q.batch_shape
    if not dims or p.batch_shape != dims or q.event_shape != p.event_shape:
        return q, p, 1
    singles = [single for each in (q, p) if (single := _single(each, len(dims))) is not None]
    if len(singles) < 2:
        return q, p, 1
    events = len(q.event_shape)
    once = [
        Independent(Normal(*single, validate_args=False), events, validate_args=False)
        for single in singles
    ]
    return once[0], once[1], dims.numel()
