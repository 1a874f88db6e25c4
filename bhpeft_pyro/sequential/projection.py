"""Another family of guides in a later round."""

from __future__ import annotations

from ..guides import Guide, GuideLike, autoguide
from ..inference.draws import seeded
from ..model.model import Model
from ..priors import Prior, closed_form

__all__ = ["guide_under", "in_family"]


def in_family(
    model: Model, last: Prior, family: GuideLike, seed: int
) -> tuple[Guide, Prior, float]:
    """A guide of another family, at the last posterior or at the nearest member of the family.

    With it come the posterior as this family can represent it, which is the next round's prior, and
    the KL from the last posterior to it in nats.

    Raises:
        GuideError: the family is unknown, or cannot have this prior.
        PriorError: the last posterior cannot be projected.
    """
    # A guide of any family can be made under independent weights, and says if it is joint.
    alone, divergence = closed_form(last, "guide").independent()
    guide = guide_under(model, alone, family, seed)
    if guide.joint:
        return guide_under(model, last, family, seed), last, 0.0
    return guide, alone, divergence


def guide_under(model: Model, prior: Prior, family: GuideLike, seed: int) -> Guide:
    """A new guide of a family under a prior."""
    with seeded(seed):
        guide: Guide = autoguide(family, model.with_prior(prior), components=1)
    return guide
