"""The end of a Laplace fit: the covariance, from the Fisher information at the point."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ..data import Examples
from ..distributions import Covariance
from ..errors import ConfigError
from ..guides import LaplaceGuide
from ..kronecker import KroneckerCovariance, matrices
from ..model import Model
from .draws import seeded
from .feed import Feed
from .fisher import every, scores
from .report import FitReport

__all__ = ["begin", "finish", "measured"]

_EXAMPLES = 512
_BATCH = 16


def begin(guide: LaplaceGuide, report: FitReport) -> None:
    """Make it a point.

    Raises:
        ConfigError: at temperature 0 there is no posterior to approximate.
    """
    if report.options.temperature == 0:
        raise ConfigError(
            "temperature=0 is maximum likelihood, without a posterior for 'laplace'; expected 1, "
            "or a 'delta' guide"
        )
    guide.hold()


def finish(model: Model, guide: LaplaceGuide, examples: Examples, report: FitReport) -> None:
    """Measure its covariance, and report it."""
    options = report.options
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed))[
        :_EXAMPLES
    ]
    feed = Feed(model, examples if len(examples) <= _EXAMPLES else examples.subset(chosen))
    with seeded(options.seed):  # of most likelihoods of one's own outcomes are drawn
        guide.spread(measured(model, guide, feed, len(examples) / options.temperature))
    prior = guide.prior
    report.kl = {guide.latent: kl_divergence(guide.normal(), prior).item()}
    before, after = guide.unpack(prior.stddev), guide.scales()
    report.scales = {k: (after[k] / before[k]).log().mean().exp().item() for k in after}


@torch.no_grad()
def measured(model: Model, guide: LaplaceGuide, feed: Feed, size: float) -> Covariance:
    """The inverse of the prior's precision plus `size` times the Fisher information of one example.

    Args:
        guide: where, and with what structure.
        feed: the examples on which it is measured; no label is looked at.
        size: N / T, the number of examples over the temperature.
    """
    prior = guide.prior.covariance
    weight = size / len(feed.examples)

    def gradients() -> Iterator[Tensor]:
        """(B, D), in units of the prior's scale."""
        means = guide.means()
        for _, batch in feed.prediction(_BATCH):
            copies = {k: v.expand(len(batch), 1, *v.shape) for k, v in means.items()}
            for each in scores(model, copies, batch.to(model.network.device), outcomes=every):
                flat = torch.cat([value.reshape(len(value), -1) for value in each.values()], 1)
                yield flat * prior.scale

    if guide.structure == "kronecker":
        return _kronecker(guide, prior, weight, gradients)
    if guide.structure == "diagonal":
        told = weight * sum(each.square().sum(0) for each in gradients())
        precision = (1 + told) / prior.scale.square()
        if not prior.rank:
            return Covariance.diagonal(precision.rsqrt())
        return Covariance.from_precision(precision, prior.precision_root())
    root = prior.scale.unsqueeze(-1) * prior.precision_root()
    precision = torch.eye(len(prior.scale)).to(root) + root @ root.mT
    for each in gradients():
        precision.addmm_(each.mT, each, alpha=weight)
    strength, axes = torch.linalg.eigh(precision.double())
    ratio = strength.clamp_min(1).rsqrt()
    return Covariance(prior.scale, axes.to(precision).contiguous(), ratio.to(precision))


def _kronecker(
    guide: LaplaceGuide,
    prior: Covariance,
    weight: float,
    gradients: Callable[[], Iterator[Tensor]],
) -> KroneckerCovariance:
    before = torch.ones_like(prior.scale)
    if isinstance(prior, KroneckerCovariance):
        factors, before = tuple(prior.factors), prior.ratio
    else:
        factors = _axes(guide, gradients)
    turn = KroneckerCovariance(prior.scale, before, factors).turned
    told = weight * sum(turn(each).square().sum(0) for each in gradients())
    return KroneckerCovariance(prior.scale, (before**-2 + told).rsqrt(), factors)


def _axes(
    guide: LaplaceGuide, gradients: Callable[[], Iterator[Tensor]]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The eigenvectors of E[G G'] and E[G' G] of each matrix of weights."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for each in gradients():
        for name, value in guide.unpack(each).items():
            g = value.reshape(len(value), *matrices(value.shape[1:]))
            left = torch.einsum("nlab,nlcb->lac", g, g)
            right = torch.einsum("nlab,nlac->lbc", g, g)
            old = sums.get(name, (0, 0))
            sums[name] = old[0] + left, old[1] + right
    return tuple(
        (torch.linalg.eigh(left)[1].contiguous(), torch.linalg.eigh(right)[1].contiguous())
        for left, right in sums.values()
    )
