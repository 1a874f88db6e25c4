"""Guides: families of approximate posteriors, by one contract."""

from .budget import Budget, budget
from .delta import DeltaGuide
from .function import FunctionGuide
from .guide import Guide
from .latent import Latent, latents
from .lowrank import LowRankGuide
from .normal import NormalGuide
from .registry import GUIDES, autoguide

__all__ = [
    "GUIDES",
    "Budget",
    "DeltaGuide",
    "FunctionGuide",
    "Guide",
    "Latent",
    "LowRankGuide",
    "NormalGuide",
    "autoguide",
    "budget",
    "latents",
]
