"""Another family of guides from one round to the next."""

from __future__ import annotations

from ..errors import PriorError
from ..guides import Guide, GuideLike, autoguide
from ..inference.draws import seeded
from ..model.model import Model
from ..priors import JointPrior, PosteriorPrior, Prior

__all__ = ["in_family"]


def in_family(
    model: Model, last: Prior, family: GuideLike, seed: int
) -> tuple[Guide, Prior, float]:
    """A guide of another family, at the last posterior or at the nearest member of the family.

    Args:
        model: the model, of whatever prior.
        last: the last posterior as a prior.
        family: what `autoguide` takes.
        seed: of random starting values.

    Returns:
        The guide; the posterior as this family can hold it, which is the next round's prior; and
        the KL from the last posterior to that, in nats.

    Raises:
        GuideError: no such family, or one that cannot follow this prior.
        PriorError: the last posterior has no closed form in another family.
    """
    if not isinstance(last, PosteriorPrior | JointPrior):
        raise PriorError(
            f"guide: the last posterior, {type(last).__name__}, has no closed form in another "
            "family; continue with its own"
        )

    def guide_under(prior: Prior) -> Guide:
        with seeded(seed):
            under = Model(model.network, prior, model.likelihood)
            return autoguide(family, under, components=1)

    # Any guide can be made under independent weights, and then says whether it holds correlations.
    alone, divergence = last.independent()
    guide = guide_under(alone)
    if guide.joint:
        return guide_under(last), last, 0.0
    return guide, alone, divergence
