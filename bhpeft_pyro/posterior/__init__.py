"""A fitted guide and everything needed to use it: one or a mixture, saved and loaded."""

from .mixture import MixturePosterior
from .posterior import Posterior

__all__ = ["MixturePosterior", "Posterior"]
