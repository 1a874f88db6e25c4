"""Guides: families of approximate posteriors under one contract."""

from .blocks import BlockGuide, MixtureGuide
from .budget import Budget
from .empirical import DrawsGuide
from .function import FunctionGuide, prior_guide, prior_like
from .guide import Guide
from .laplace import LaplaceGuide
from .latent import Latent, latents
from .mean_field import DeltaGuide, NormalGuide
from .optimizers import NaturalGradient
from .pyro_guides import PyroGuide
from .registry import COMPONENTS, GUIDES, PRESETS, GuideLike, autoguide, budget, check_made_for

__all__ = [
    "COMPONENTS",
    "GUIDES",
    "PRESETS",
    "BlockGuide",
    "Budget",
    "DeltaGuide",
    "DrawsGuide",
    "FunctionGuide",
    "Guide",
    "GuideLike",
    "LaplaceGuide",
    "Latent",
    "MixtureGuide",
    "NaturalGradient",
    "NormalGuide",
    "PyroGuide",
    "autoguide",
    "budget",
    "check_made_for",
    "latents",
    "prior_guide",
    "prior_like",
]
