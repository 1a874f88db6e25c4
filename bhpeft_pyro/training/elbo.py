"""The loss: N * E[nll] + temperature * KL, with access to both parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import kl_divergence

from ..base.distributions import base_of
from ..errors import GuideError


class Parts(NamedTuple):
    """Expected NLL and, by site, KL to the prior at the last evaluation, in nats for all data; and
    minus the expected log density of `evidence`, what the prior observes: sites that are held
    fixed, and factors."""

    nll: Tensor
    kl: dict[str, Tensor]
    evidence: Tensor


class ELBO(TraceMeanField_ELBO):
    """Negative evidence lower bound of reparameterised guides, in nats for the whole data set.

    It is Pyro's `TraceMeanField_ELBO` (the KL in closed form if there is one, Monte Carlo
    otherwise) with three differences. The KL is weighted by `temperature`, whatever its form. The
    NLL, the KL per site and what the prior observes are kept apart in `parts`. The log density of a
    Delta, which is that of a transformed latent, counts.

    Args:
        num_particles: weight draws per evaluation, in one pass. A batch that is `split` into as
            many parts gives each draw its own examples.
        temperature: weight of the KL; 1 for the posterior, 0 for maximum likelihood.

    Raises:
        GuideError: at the first evaluation, if the guide and the model do not have the same sites,
            or if a draw of the guide has no gradient.

    >>> from bhpeft_pyro.testing import tiny_batch, tiny_model
    >>> from bhpeft_pyro.guides import MeanFieldGuide
    >>> model = tiny_model()
    >>> loss = ELBO(num_particles=2)(model, MeanFieldGuide(model))   # an nn.Module
    >>> loss(tiny_batch(4).split(2)).requires_grad
    True
    """

    def __init__(self, num_particles: int = 1, temperature: float = 1.0) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        self.temperature = temperature
        self.parts: Parts | None = None

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        if is_validation_enabled():
            # Without this check, gradients of other draws would be wrong without a warning.
            nodes: dict[str, Any] = dict(guide_trace.iter_stochastic_nodes())
            for name, node in nodes.items():
                if not (node["fn"].has_rsample or node["infer"].get("is_auxiliary")):
                    raise _no_gradient(name, node)
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace, model_trace = map(prune_subsample_sites, (guide_trace, model_trace))
        # Latents get a log-probability only if their KL has no closed form.
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        return model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[float, Tensor]:
        nodes: dict[str, Any] = model_trace.nodes
        guide_nodes: dict[str, Any] = guide_trace.nodes
        nll = evidence = torch.zeros(())
        kl: dict[str, Tensor] = {}
        for name, site in nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                if name == "label":
                    nll = nll - site["log_prob_sum"]
                else:
                    evidence = evidence - site["log_prob_sum"]
            elif name not in guide_nodes:
                raise GuideError(
                    f"guide: the site {name!r} of the model is not sampled (if it is the "
                    "likelihood's, it has to be one of its `sites`; docs/own-model.md)"
                )
            else:
                kl[name] = _kl(guide_nodes[name], site)
        for name, site in guide_nodes.items():
            if site["type"] == "sample" and name not in nodes:
                if not site["infer"].get("is_auxiliary"):
                    raise GuideError(
                        f"guide: it samples {name!r}, which is not in the model; mark auxiliary "
                        "variables with infer={'is_auxiliary': True}"
                    )
                kl[name] = value = _log_prob(site)
                if value.requires_grad and not site["fn"].has_rsample:
                    raise _no_gradient(name, site)  # noise without parameters is fine
        loss = nll + evidence + self.temperature * sum(kl.values())
        scale = 1.0 / self.num_particles
        by_site = {name: value.detach() * scale for name, value in kl.items()}
        self.parts = Parts(nll.detach() * scale, by_site, evidence.detach() * scale)
        return loss.item(), loss


def _kl(guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
    q, p = guide_site["fn"], model_site["fn"]
    # Pyro's KL from a Delta omits its log density (the Jacobian of a transformed latent).
    alike = guide_site["scale"] == model_site["scale"] and guide_site["mask"] is model_site["mask"]
    if alike and not isinstance(base_of(q), Delta):
        try:
            kl = scale_and_mask(kl_divergence(q, p), guide_site["scale"], guide_site["mask"])
            return kl.sum()
        except NotImplementedError:
            pass
    return _log_prob(guide_site) - _log_prob(model_site)


def _log_prob(site: dict[str, Any]) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()


def _no_gradient(name: str, node: dict[str, Any]) -> GuideError:
    return GuideError(
        f"guide: a {type(base_of(node['fn'])).__name__} at {name!r} cannot be reparameterised "
        "(has_rsample), so its draws have no gradient; expected a distribution with one, such as "
        "a Normal"
    )
