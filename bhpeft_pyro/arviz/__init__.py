"""Posteriors for ArviZ: `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x), with named dims.

The draws of a fitted guide are independent, so there is one chain (of a mixture one for each
component), and r_hat or effective sample
sizes say nothing about how well the guide fits. What the export is good for: summaries and
plots by layer or label, prior against posterior, posterior predictive checks, PSIS-LOO.
"""

from .export import SMALL, to_arviz

__all__ = ["SMALL", "to_arviz"]
