"""`autoguide`: a guide by name, or any of Pyro's by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

from pyro.infer.autoguide import AutoGuide

from ..errors import GuideError
from ..model import Model
from .blocks import BlockGuide, Family, plan
from .budget import Budget, budget
from .delta import DeltaGuide
from .guide import Guide
from .laplace import LaplaceGuide
from .latent import latents
from .lowrank import FullGuide, LowRankGuide
from .mixture import MixtureGuide
from .normal import NormalGuide
from .presets import PRESETS
from .pyro_guide import PYROS, PyroGuide

__all__ = ["COMPONENTS", "GUIDES", "GuideLike", "autoguide"]

GUIDES: dict[str, Callable[..., Guide]] = {
    "laplace": LaplaceGuide,
    "normal": NormalGuide,
    "lowrank": LowRankGuide,
    "full": FullGuide,
    "delta": DeltaGuide,
}
"""This package's guides, by the names that `autoguide` knows them under."""
COMPONENTS = {"laplace": 5}
"""Of how many components a mixture is by default, where not of one."""
GuideLike = str | type[AutoGuide] | Mapping[str, Family]
"""What `autoguide` makes a guide of."""


def autoguide(
    name: GuideLike,
    model: Model,
    *,
    components: int | None = None,
    max_bytes: int = 2**33,
    **options: Any,
) -> Guide:
    """A guide for a model.

    Args:
        name: "laplace", "normal", "lowrank", "full" or "delta" (this package's); a
            mapping from patterns of site names to the others (`BlockGuide`), or "down only" or
            "A only", which are ready ones; or one of Pyro's autoguides (`PyroGuide`): "mvn",
            "structured" or "iaf", or any other by its name or class, e.g.
            "AutoLowRankMultivariateNormal".
        model: the model.
        components: how many guides make a mixture (`MixtureGuide`), each of which `fit` starts
            elsewhere; by default 5 of "laplace" and 1 of the others.
        max_bytes: a guide that would take more while it is fitted is refused before it is made.
        options: passed on to the guide's constructor, or to the preset; a mapping has its own.

    Raises:
        GuideError: an unknown name, options the guide does not know, or a guide too large.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> type(autoguide("normal", tiny_model(), init_scale=0.01)).__name__
    'NormalGuide'
    >>> len(autoguide("laplace", tiny_model()).components)
    5
    """
    if components is None:
        components = COMPONENTS.get(name, 1) if isinstance(name, str) else 1
    if not isinstance(components, int) or components < 1:
        raise GuideError(f"autoguide: components={components!r} must be an integer of at least 1")
    if components > 1:
        one = {"components": 1, "max_bytes": max_bytes, **options}  # they are fitted in turn
        return MixtureGuide([autoguide(name, model, **one) for _ in range(components)])
    if isinstance(name, str) and name in PRESETS:
        names = [own for latent in latents(model) for own in latent.names]
        try:
            name, options = PRESETS[name](names, **options), {}
        except TypeError as error:
            raise GuideError(f"autoguide: {name!r} does not take {options}: {error}") from error
    if isinstance(name, Mapping):
        return _blocks(name, model, max_bytes, options)
    make: Callable[..., Guide]
    if isinstance(name, str) and name in GUIDES:
        make = GUIDES[name]
    elif name in PYROS or (isinstance(name, type) and issubclass(name, AutoGuide)):
        make = partial(PyroGuide, family=name)
    else:
        known = ", ".join([*GUIDES, *PRESETS, *PYROS])
        raise GuideError(f"autoguide: unknown guide {name!r}; known: {known}")
    known_as = name if isinstance(name, str) else name.__name__
    shapes = [tuple(latent.loc.shape) for latent in latents(model)]
    refused = f"autoguide: {name!r} does not take {options}"
    try:
        size = budget(known_as, sum(map(prod, shapes)), shapes, **options)
    except (TypeError, ValueError) as error:
        raise GuideError(f"{refused}: {error}") from error
    if size:
        size.check(known_as, max_bytes)
    try:
        return make(model, **options)
    except GuideError as error:
        raise GuideError(f"autoguide: {name!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise GuideError(f"{refused}: {error}") from error


def _blocks(
    families: Mapping[str, Family], model: Model, max_bytes: int, options: Mapping[str, Any]
) -> BlockGuide:
    if options:
        raise GuideError(
            f"autoguide: a mapping does not take {options}; give them to a family, as in "
            '{"*": ("lowrank", {"rank": 64})}'
        )
    size = Budget(0, 0, 0)
    for block in plan(families, latents(model)):
        size += block.budget
    size.check(str(dict(families)), max_bytes)
    return BlockGuide(model, families)
