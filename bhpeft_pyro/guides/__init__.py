"""Guides: families of approximate posteriors, by one contract."""

from .budget import Budget, budget
from .delta import DeltaGuide
from .function import FunctionGuide
from .guide import Guide
from .latent import Latent, latents
from .lowrank import LinearGuide, LowRankGuide
from .normal import NormalGuide
from .registry import GUIDES, autoguide

__all__ = [
    "GUIDES",
    "Budget",
    "DeltaGuide",
    "FunctionGuide",
    "Guide",
    "Latent",
    "LinearGuide",
    "LowRankGuide",
    "NormalGuide",
    "autoguide",
    "budget",
    "latents",
]
