"""A likelihood of one's own that is far from a Normal: counts."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist

from bhpeft_pyro.model.likelihoods import Likelihood, Outputs

COUNTS = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"] * 3, "label": [0.0, 4.0, 1.0, 9.0] * 3}


class Counts(Likelihood):
    """Poisson counts, 3 where the output is 0."""

    kind = "rating"
    outputs = 1

    def distribution(self, outputs: Outputs) -> Any:
        return dist.Poisson(3.0 * outputs.values[..., 0].exp())
