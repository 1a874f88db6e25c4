"""How the last round's fit went: the group `sample_stats`."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from ..inference.report import FitReport

__all__ = ["trace"]

_STEPS = {
    "loss": "negative ELBO (nats per example)",
    "nll": "expected NLL (nats per example)",
    "kl": "KL to the prior (nats per example)",
    "temperature": "weight of the KL",
    "lr": "learning rate",
    "gradient": "norm of the gradient (nats per example)",
    "validation_nll": "NLL of the validation data (nats per example)",
}


def trace(report: FitReport) -> xr.Dataset:
    """(step,) traces, NaN where a quantity was not evaluated, and (site,) numbers at the end.

    >>> from bhpeft_pyro.inference import FitOptions
    >>> report = FitReport(9, "", FitOptions(), steps=3, history=[{"step": 1, "loss": 2.0},
    ...                                                           {"step": 3, "loss": 1.0}])
    >>> trace(report)["loss"].values, trace(report)["skipped"].values
    (array([ 2., nan,  1.]), array([False,  True, False]))
    """
    by_step = {int(entry["step"]): entry for entry in report.history}
    # Restarts, whose entries are means, have the same steps again.
    count = max((each.steps for each in report.components), default=report.steps)
    steps = np.arange(1, count + 1)
    found = {}
    for name, words in _STEPS.items():
        values = np.array([by_step.get(step, {}).get(name, math.nan) for step in steps.tolist()])
        if not np.isnan(values).all():
            found[name] = ("step", values, {"long_name": words})
    skipped = np.array([step not in by_step for step in steps.tolist()], dtype=bool)
    words = "left out, as loss or gradient were not finite"
    found["skipped"] = ("step", skipped, {"long_name": words})
    kls = report.marginal_kl | report.kl
    sites = [*kls, *(name for name in report.scales if name not in kls)]
    for name, by_site, words in (
        ("site_kl", kls, "KL to the prior (nats)"),
        ("site_scale", report.scales, "posterior sd / prior sd, geometric mean"),
    ):
        values = np.array([by_site.get(site, math.nan) for site in sites])
        found[name] = ("site", values, {"long_name": words})
    return xr.Dataset(found, coords={"step": steps, "site": sites})
