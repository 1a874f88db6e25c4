"""`autoguide`: a guide by name, by site pattern, or any of Pyro's by class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import nn

from ..base.checks import shown
from ..base.isolation import alone, seeded
from ..base.names import first_match
from ..errors import GuideError, PriorError
from ..model.model import Model
from .foreign import ForeignGuide, FunctionGuide, ModuleGuide
from .guide import Guide, check_no_others
from .laplace.laplace_guide import LaplaceGuide
from .latent import check_separate, latents
from .mean_field import FAMILIES, Family, MeanFieldGuide
from .pyro_guides import PYROS, PyroGuide

GUIDES = ("laplace", *FAMILIES)
"""This package's guides, by the names that `autoguide` takes."""
PRESETS = {"down only": ("*.A", "*.down"), "A only": ("lora.*.A",)}
"""Names of mappings in which some sites are Normal and all others point estimates.

"down only" has random down-projections (LoRA A, adapter), as the code of the paper (arXiv
2508.02711); "A only" has random LoRA A, as BLoB (Wang et al. 2024).
"""
COMPONENTS = {"laplace": 5}
"""The default number of components where it is not one."""
GuideLike = str | type[AutoGuide] | Mapping[str, Family]
"""What `autoguide` makes a guide from."""


def default_components(guide: object) -> int:
    """The number of components of a guide that is fitted without one being given."""
    return COMPONENTS.get(guide, 1) if isinstance(guide, str) else 1


def autoguide(name: GuideLike, model: Model, **options: Any) -> Guide:
    """A guide for a model.

    Args:
        name: "laplace", "normal" or "delta" (this package's); a mapping from patterns of site
            names to "normal" or "delta" (`MeanFieldGuide`), or "down only" or "A only", which are
            such mappings; or one of Pyro's autoguides (`PyroGuide`): "mvn", "lowrank",
            "structured" or "iaf", or any other by its name or class, such as "AutoDiagonalNormal".
        model: the model.
        options: of the guide's constructor or family; of "down only" and "A only" the `width` of
            point estimates. A mapping contains its own.

    Raises:
        GuideError: an unknown name, or options that the guide does not take.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> autoguide("normal", tiny_model(), init_scale=0.01).title()
    'MeanFieldGuide(normal(init_scale=0.01))'
    """
    if not isinstance(name, str | type | Mapping):
        raise GuideError(
            f"guide: expected a guide's name or class, or a mapping, got {shown(name)}"
        )
    called = name.__name__ if isinstance(name, type) else name
    refused = f"autoguide: {called!r} does not take {options}"
    if isinstance(name, str) and name in PRESETS:
        if options.keys() - {"width"}:
            raise GuideError(f"{refused}; expected no option but width")
        names = [site for latent in latents(model) for site in latent.names]
        name, options = _preset(name, names, **options), {}
    if isinstance(name, Mapping):
        if options:
            raise GuideError(
                f"autoguide: a mapping does not take {options}; give them to a family, as in "
                '{"*": ("normal", {"init_scale": 0.1})}'
            )
        return MeanFieldGuide(model, name)
    make = _made_by(name)
    try:
        return make(model, **options)
    except GuideError as error:
        raise GuideError(f"autoguide: {called!r}: {error}") from error
    except PriorError:  # of the model's latents
        raise
    except (TypeError, ValueError) as error:
        why = refused if options else f"autoguide: {called!r} needs more than a model"
        raise GuideError(f"{why}: {error}") from error


def _made_by(name: Any) -> Callable[..., Guide]:
    if name == "laplace":
        return LaplaceGuide
    if isinstance(name, str) and name in FAMILIES:
        return lambda model, **options: MeanFieldGuide(model, (name, options) if options else name)
    if name in PYROS or (isinstance(name, type) and issubclass(name, AutoGuide)):
        return partial(PyroGuide, family=name)
    if isinstance(name, type) and issubclass(name, nn.Module):
        raise GuideError(
            f"guide: expected a guide, got the class {name.__name__}; pass {name.__name__}(model)"
        )
    expected = ", ".join([*GUIDES, *PRESETS, *PYROS])
    raise GuideError(f"autoguide: unknown guide {name!r}; known: {expected}")


def _preset(preset: str, names: Sequence[str], width: float | None = None) -> dict[str, Family]:
    # What the prior samples in place of a site, or for its scale, is named "<site>.something".
    stems = PRESETS[preset]
    patterns = [pattern for stem in stems for pattern in (stem, f"{stem}.*")]
    used = [p for p in patterns if any(first_match(name, [p]) for name in names)]
    if not used:
        raise GuideError(
            f"guide: {preset!r} needs a site whose name matches {' or '.join(stems)}; sites: "
            f"{', '.join(names)}"
        )
    families: dict[str, Family] = dict.fromkeys(used, "normal")
    if any(first_match(name, used) is None for name in names):
        families["*"] = "delta" if width is None else ("delta", {"width": width})
    return families


def trained_by_pyro(guide: Guide, model: Model) -> Guide:
    """A copy of a guide that Pyro has trained on this model: a function's parameters are taken from
    Pyro's store, and an autoguide becomes one that can be saved, if it can be made again."""
    if isinstance(guide, FunctionGuide):
        guide.load_store()
        return guide
    if isinstance(guide, ModuleGuide) and isinstance(guide.module, AutoGuide):
        return PyroGuide.of(model, guide.module) or guide  # Pyro's flows cannot be copied
    return guide if guide.draws_kept else copy.deepcopy(guide)


def check_sampled(model: Model, guide: Guide) -> None:
    """Compare what a guide of Pyro samples with the model's latents, as the first step of a fit
    does.

    Raises:
        GuideError: a latent is missing, unknown, or of another shape.
    """
    if not isinstance(guide, ForeignGuide | PyroGuide):
        return  # `check_made_for` has looked at it
    guide.set_prior(model)
    with seeded(0), alone(), torch.enable_grad():
        trace = prune_subsample_sites(poutine.trace(guide).get_trace(None))
    nodes: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    if isinstance(guide, FunctionGuide):  # a posterior has a copy of its parameters alone
        drawn = sum((node["value"].sum() for node in nodes.values()), torch.zeros(()))
        check_no_others(drawn, guide)
    sampled = {
        name: tuple(node["value"].shape)
        for name, node in nodes.items()
        if not node["infer"].get("is_auxiliary")
    }
    shapes = {latent.name: tuple(latent.prior.shape()) for latent in latents(model)}
    _refuse_differences(guide, sampled, shapes, shapes.keys(), shapes.keys())


def check_made_for(model: Model, guide: Guide) -> None:
    """Compare the sites of a guide's central values with the model's.

    Guides of Pyro, modules, and guides without central values are checked by the first step, which
    compares traces.

    Raises:
        GuideError: a site is missing, unknown, or of another shape; or the prior is joint, and the
            guide samples each site on its own.
    """
    if isinstance(guide, FunctionGuide):
        check_sampled(model, guide)
    if isinstance(guide, ForeignGuide | PyroGuide):
        return
    covered = latents(model)
    if not guide.joint and guide.draws_kept is None:  # draws of all weights are split
        check_separate(guide.title(), covered)
    try:
        central = {name: tuple(value.shape) for name, value in guide.means().items()}
    except GuideError:
        return
    shapes = {site.name: site.shape for site in model.sites}
    sampled = {name for latent in covered for name in latent.names}
    _refuse_differences(guide, central, shapes, shapes.keys() & sampled, shapes.keys() | sampled)


def _refuse_differences(
    guide: Guide,
    given: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    needed: Collection[str],
    allowed: Collection[str],
) -> None:
    """Raise a GuideError if names or shapes that a guide has are not those of the model."""
    differences = {
        "it lacks": [name for name in shapes if name in needed and name not in given],
        "the model lacks": [name for name in given if name not in allowed],
        "other shapes of": [n for n, shape in shapes.items() if given.get(n, shape) != shape],
    }
    if wrong := [f"{what} {', '.join(names)}" for what, names in differences.items() if names]:
        if isinstance(guide, FunctionGuide):
            raise GuideError(
                f"guide: the function does not sample what the model does: {'; '.join(wrong)}; "
                "expected each latent, and infer={'is_auxiliary': True} at all others"
            )
        raise GuideError(
            f"guide: this {guide.title()} was made for another model: {'; '.join(wrong)}; "
            "expected one made for the model that is fitted"
        )
