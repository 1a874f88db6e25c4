"""A fitted guide and everything needed to use it: one or a mixture, saved and loaded."""

from .posterior import MixturePosterior, Posterior

__all__ = ["MixturePosterior", "Posterior"]
