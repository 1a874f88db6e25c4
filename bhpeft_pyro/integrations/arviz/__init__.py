"""Posteriors for ArviZ: `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x), with named dims.

The draws of a fitted guide are independent, so r_hat and effective sample sizes say nothing about
how well the guide fits. The export is for summaries and plots by layer or label, prior against
posterior, posterior predictive checks, and PSIS-LOO.
"""

from .export import SMALL, to_arviz

__all__ = ["SMALL", "to_arviz"]
