"""Guides: families of approximate posteriors under one contract."""

from .blocks import BlockGuide, PriorGuide, prior_like
from .foreign import DrawsGuide, ForeignGuide, FunctionGuide, as_guide
from .guide import Guide
from .laplace.laplace_guide import LaplaceGuide
from .latent import Latent, latents
from .mean_field import DeltaGuide, NaturalGradient, NormalGuide
from .pyro_guides import PyroGuide
from .registry import COMPONENTS, GUIDES, PRESETS, GuideLike, autoguide, check_made_for

__all__ = [
    "COMPONENTS",
    "GUIDES",
    "PRESETS",
    "BlockGuide",
    "DeltaGuide",
    "DrawsGuide",
    "ForeignGuide",
    "FunctionGuide",
    "Guide",
    "GuideLike",
    "LaplaceGuide",
    "Latent",
    "NaturalGradient",
    "NormalGuide",
    "PriorGuide",
    "PyroGuide",
    "as_guide",
    "autoguide",
    "check_made_for",
    "latents",
    "prior_like",
]
