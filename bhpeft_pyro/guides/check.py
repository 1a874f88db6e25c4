"""Whether a guide is of the model that it is to be fitted to."""

from __future__ import annotations

from torch import nn

from ..errors import GuideError
from ..model import Model
from .delta import DeltaGuide
from .guide import Guide
from .latent import latents
from .normal import NormalGuide
from .pyro_guide import PyroGuide

__all__ = ["check_made_for"]


def check_made_for(model: Model, guide: nn.Module) -> None:
    """Compare the sites that a guide tells its central values of with the model's.

    Pyro's guides and those that do not tell are left to the first step, which compares traces.

    Raises:
        GuideError: a site is missing, unknown, or of another shape; or the prior is joint, and the
            guide has a latent for each site.
    """
    if not isinstance(guide, Guide) or isinstance(guide, PyroGuide):
        return
    there = latents(model)
    joint = [name for latent in there for name in latent.sites]
    if joint and isinstance(guide, NormalGuide | DeltaGuide):
        raise GuideError(
            f"guide: under this prior {', '.join(joint)} are drawn jointly, which a "
            f"{type(guide).__name__} is not; expected 'laplace', 'lowrank' or 'full', or "
            "posterior.update(data, guide=...) of the posterior that the prior comes from"
        )
    try:
        found = {name: tuple(value.shape) for name, value in guide.means().items()}
    except NotImplementedError:
        return
    shapes = {site.name: site.shape for site in model.sites}
    sampled = {name for latent in there for name in latent.names}
    missing = [name for name in shapes if name in sampled - found.keys()]
    unknown = [name for name in found if name not in sampled | shapes.keys()]
    other = [name for name, shape in shapes.items() if found.get(name, shape) != shape]
    wrong = [
        f"{what} {', '.join(names)}"
        for what, names in (
            ("it lacks", missing),
            ("the model lacks", unknown),
            ("other shapes of", other),
        )
        if names
    ]
    if wrong:
        raise GuideError(
            f"guide: this {type(guide).__name__} was made for another model: {'; '.join(wrong)}; "
            "expected one made for the model that is fitted"
        )
