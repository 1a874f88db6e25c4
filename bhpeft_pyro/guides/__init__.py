"""Guides: families of approximate posteriors under one contract."""

from .foreign import DrawsGuide, ForeignGuide, FunctionGuide, as_guide
from .guide import Guide
from .laplace.laplace_guide import LaplaceGuide
from .latent import Latent, latents
from .mean_field import MeanFieldGuide, NaturalGradient
from .prior_guide import PriorGuide, prior_like
from .pyro_guides import PyroGuide
from .registry import COMPONENTS, GUIDES, PRESETS, GuideLike, autoguide, check_made_for

__all__ = [
    "COMPONENTS",
    "GUIDES",
    "PRESETS",
    "DrawsGuide",
    "ForeignGuide",
    "FunctionGuide",
    "Guide",
    "GuideLike",
    "LaplaceGuide",
    "Latent",
    "MeanFieldGuide",
    "NaturalGradient",
    "PriorGuide",
    "PyroGuide",
    "as_guide",
    "autoguide",
    "check_made_for",
    "latents",
    "prior_like",
]
