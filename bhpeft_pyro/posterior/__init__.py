"""Fitted guides and everything needed to use them: predicted with, updated, saved and loaded."""

from .posterior import Posterior

__all__ = ["Posterior"]
