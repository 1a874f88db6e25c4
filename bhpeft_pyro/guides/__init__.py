"""Guides: families of approximate posteriors, by one contract."""

from .blocks import BlockGuide
from .budget import Budget, budget
from .check import check_made_for
from .delta import DeltaGuide
from .function import FunctionGuide
from .guide import Guide
from .laplace import LaplaceGuide
from .latent import Latent, latents
from .lowrank import FullGuide, LowRankGuide
from .mixture import MixtureGuide
from .normal import NormalGuide
from .presets import PRESETS
from .prior import prior_guide, prior_like
from .pyro_guide import PyroGuide
from .registry import COMPONENTS, GUIDES, GuideLike, autoguide

__all__ = [
    "COMPONENTS",
    "GUIDES",
    "PRESETS",
    "BlockGuide",
    "Budget",
    "DeltaGuide",
    "FullGuide",
    "FunctionGuide",
    "Guide",
    "GuideLike",
    "LaplaceGuide",
    "Latent",
    "LowRankGuide",
    "MixtureGuide",
    "NormalGuide",
    "PyroGuide",
    "autoguide",
    "budget",
    "check_made_for",
    "latents",
    "prior_guide",
    "prior_like",
]
