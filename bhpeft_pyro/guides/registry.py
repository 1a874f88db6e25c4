"""`autoguide`: a guide by name, by site pattern, or any of Pyro's by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import nn

from ..checks import COUNT
from ..errors import GuideError
from ..model.model import Model
from ..patterns import first_match
from .blocks import BlockGuide, Family, check_separate
from .budget import budget
from .delta import DeltaGuide
from .guide import Guide
from .laplace import LaplaceGuide
from .latent import latents
from .mixture import MixtureGuide
from .normal import NormalGuide
from .pyro_guides import PYROS, PyroGuide

__all__ = [
    "COMPONENTS",
    "GUIDES",
    "PRESETS",
    "GuideLike",
    "a_only",
    "autoguide",
    "check_made_for",
    "down_only",
]


def check_made_for(model: Model, guide: nn.Module) -> None:
    """Compare the sites of a guide's central values with the model's.

    Pyro's guides, and guides without central values, are left to the first step, which compares
    traces.

    Raises:
        GuideError: a site is missing, unknown, or of another shape; or the prior is joint, and the
            guide has a latent for each site.
    """
    if not isinstance(guide, Guide) or isinstance(guide, PyroGuide):
        return
    there = latents(model)
    if isinstance(guide, NormalGuide | DeltaGuide | BlockGuide):
        check_separate(guide.title(), there)
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


def down_only(names: Sequence[str], width: float | None = None) -> dict[str, Family]:
    """Normal down-projections (LoRA A, adapter, prefix encoder), as the code of the paper has it
    (arXiv 2508.02711).

    Points: up-projections, the embedding of the prefix, a prefix without encoder, and the head.

    Args:
        names: of the model's latents.
        width: of the points, as priors of a next round (`DeltaGuide`).

    Raises:
        GuideError: there is no down-projection.
    """
    return _random("down only", ("*.A", "*.down"), names, width)


def a_only(names: Sequence[str], width: float | None = None) -> dict[str, Family]:
    """Normal LoRA A, all else a point, as in BLoB (Wang et al. 2024).

    Args:
        names, width: as for `down_only`.

    Raises:
        GuideError: there is no LoRA.
    """
    return _random("A only", ("lora.*.A",), names, width)


PRESETS: dict[str, Callable[..., dict[str, Family]]] = {"down only": down_only, "A only": a_only}
"""Ready mappings for `autoguide`, by name."""


def _random(
    preset: str, stems: Iterable[str], names: Sequence[str], width: float | None
) -> dict[str, Family]:
    # Latents that the prior has in place of a site, or for its scale, have names that go on.
    patterns = [pattern for stem in stems for pattern in (stem, f"{stem}.*")]
    found = [p for p in patterns if any(first_match(name, [p]) for name in names)]
    if not found:
        raise GuideError(
            f"guide: {preset!r} has nothing to be random, no site is named like "
            f"{' or '.join(stems)}; sites: {', '.join(names)}"
        )
    points: Family = "delta" if width is None else ("delta", {"width": width})
    families: dict[str, Family] = dict.fromkeys(found, "normal")
    if any(first_match(name, found) is None for name in names):
        families["*"] = points
    return families


GUIDES: dict[str, Callable[..., Guide]] = {
    "laplace": LaplaceGuide,
    "normal": NormalGuide,
    "delta": DeltaGuide,
}
"""This package's guides, by the names that `autoguide` takes."""
COMPONENTS = {"laplace": 5}
"""The number of components by default, where it is not one."""
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
        name: "laplace", "normal" or "delta" (this package's); a mapping from patterns of site
            names to "normal" or "delta" (`BlockGuide`), or "down only" or "A only", which are such
            mappings; or one of Pyro's autoguides (`PyroGuide`): "mvn", "lowrank", "structured" or
            "iaf", or any other by its name or class, such as "AutoDiagonalNormal".
        model: the model.
        components: how many guides make a mixture (`MixtureGuide`), each of which `fit` starts
            elsewhere; by default 5 of "laplace" and 1 of the others.
        max_bytes: a guide that would take more memory during a fit is refused before it is made.
        options: of the guide's constructor, or of the preset; a mapping holds its own.

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
    components = COUNT("autoguide: components", components, GuideError)
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
        if options:
            raise GuideError(
                f"autoguide: a mapping does not take {options}; give them to a family, as in "
                '{"*": ("normal", {"init_scale": 0.1})}'
            )
        return BlockGuide(model, name)
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
