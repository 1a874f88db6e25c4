"""Another family of guides from one round to the next: what it can hold of the last posterior."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import fsum

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution

from ..distributions import Covariance, LowRankNormal
from ..errors import PriorError
from ..guides import Guide, GuideLike, LowRankGuide, autoguide
from ..inference.elbo import seeded
from ..model.model import Model
from ..priors import BlockPrior, JointPrior, PosteriorPrior, Prior, joint_name, unpack

__all__ = ["in_family", "projected"]


def in_family(
    model: Model, last: Prior, family: GuideLike, seed: int
) -> tuple[Guide, Prior, float]:
    """A guide of another family, at the last posterior or what is nearest to it.

    Args:
        model: the model, of whatever prior.
        last: the last posterior as a prior.
        family: what `autoguide` takes.
        seed: of whatever the guide draws when it is made.

    Returns:
        The guide; the posterior as it stands there, the next round's prior; and what was lost, the
        KL of `projected`.

    Raises:
        GuideError: no such family, or one that cannot follow this prior.
        PriorError: as for `projected`.
    """

    def guide_under(prior: Prior) -> Guide:
        with seeded(seed):
            under = Model(model.network, prior, model.likelihood)
            return autoguide(family, under, components=1)

    # A guide knows itself what it holds together; under independent weights any can be made.
    alone, _ = projected(last, ())
    blocks = guide_under(alone).blocks()
    together = [block.means().keys() for block in blocks if isinstance(block, LowRankGuide)]
    prior, divergence = projected(last, together)
    return guide_under(prior), prior, divergence


def projected(last: Prior, together: Sequence[Collection[str]]) -> tuple[Prior, float]:
    """The nearest p to a posterior q, in KL(q || p), with only some correlations left.

    Among products of Normals over given groups of weights the nearest one has the mean and the
    covariances within groups of q itself (moment matching, as in assumed density filtering; Opper
    1998), so nothing becomes surer of itself than it was. With S the covariance of q and S_b its
    blocks, KL(q || p) = (sum_b log det S_b - log det S) / 2.

    Args:
        last: q.
        together: sites of which correlations are kept; all other weights are on their own.

    Returns:
        The nearest p, and KL(q || p) in nats. That is 0 if p is q, so where q has no correlations
        but those within the groups.

    Raises:
        PriorError: q is not made of Normals, by site or over several sites.

    >>> q = LowRankNormal(torch.zeros(2), Covariance(
    ...     torch.ones(2), torch.full((2, 1), 0.5**0.5), torch.tensor([0.5])))
    >>> p, kl = projected(JointPrior(q, {"a": (1,), "b": (1,)}), ())
    >>> p.distributions["a"].variance, round(kl, 4)      # correlated by -0.6
    (tensor([0.6250]), 0.2231)
    """
    if isinstance(last, PosteriorPrior):
        return last, 0.0
    parts = last.parts if isinstance(last, BlockPrior) else (last,)
    whole: list[JointPrior] = []
    single: dict[str, TorchDistribution] = {}
    for part in parts:
        if isinstance(part, JointPrior):
            whole.append(part)
        elif isinstance(part, PosteriorPrior):
            single |= part.distributions
        else:
            raise PriorError(
                f"guide: the last posterior, {type(part).__name__}, has no closed form in another "
                "family; go on with its own"
            )
    lost = [-_log_ratio(part) for part in whole]
    joint: list[JointPrior] = []
    for group in together:
        pieces = [part.marginal(group) for part in whole if {*part.shapes} & {*group}]
        if pieces:
            lost += map(_log_ratio, pieces)
            alone = [_joint(name, single.pop(name)) for name in group if name in single]
            joint.append(_merged([*pieces, *alone]))
    held = {name for part in joint for name in part.shapes}
    for part in whole:
        means, sds, away = (
            unpack(value, part.shapes)
            for value in (part.normal.loc, part.normal.stddev, part.normal.covariance.scale)
        )
        for name in part.shapes:
            if name not in held:
                single[name] = dist.Normal(means[name], sds[name]).to_event(means[name].dim())
                lost.append((sds[name] / away[name]).double().log().sum().item())
    return BlockPrior.of(single, joint), fsum(lost)


def _log_ratio(part: JointPrior) -> float:
    """Half the log determinant; sds away from the axes stay what they are, so they are left out."""
    return part.normal.covariance.ratio.double().log().sum().item()


def _joint(name: str, alone: TorchDistribution) -> JointPrior:
    """Independent Normals as one over a vector."""
    normal = LowRankNormal(alone.mean.flatten(), Covariance.diagonal(alone.stddev.flatten()))
    return JointPrior(normal, {name: tuple(alone.event_shape)})


def _merged(pieces: Sequence[JointPrior]) -> JointPrior:
    """Independent Normals over several sites as one over them all."""
    if len(pieces) == 1:
        return pieces[0]
    loc = torch.cat([piece.normal.loc for piece in pieces])
    covariance = Covariance.blocks([piece.normal.covariance for piece in pieces])
    shapes = {name: shape for piece in pieces for name, shape in piece.shapes.items()}
    return JointPrior(LowRankNormal(loc, covariance), shapes, joint_name(shapes))
