"""Last-layer Laplace (Daxberger et al. 2021) around a fitted point, as a Pyro guide."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from datasets import Dataset
from pyro.ops.hessian import hessian
from torch import Tensor
from torch.distributions import kl_divergence

from ..batch import Batch
from ..inference.draws import point
from ..inference.feed import Feed
from ..inference.predict import AnyForecast, predict
from ..posterior import Posterior

__all__ = ["SCALES", "LastLayer"]

SCALES = (0.3, 1.0, 3.0, 10.0)
"""Sds of the head's prior, in its unit, among which the validation rows choose."""


class LastLayer:
    """A Normal over the head, all else held at the point.

    Its precision is that of the prior N(0, (scale * unit)^2) plus the Fisher information of the
    training rows, in closed form: the Hessian of the sum of KL(p(y | w0) || p(y | w)) at w = w0.
    For classes that is the Hessian of the NLL itself, as the head is linear.

    Args:
        posterior: a fitted point (`DeltaGuide`).
        train: the rows that it was fitted to.
    """

    def __init__(self, posterior: Posterior, train: Dataset) -> None:
        self.posterior, self.model = posterior, posterior.model
        given = point(self.model, posterior.guide)
        self.weights = {name: value[0, 0] for name, value in given.items()}
        self.head = [site for site in self.model.sites if site.role == "head"]
        self.loc = torch.cat([self.weights[site.name].flatten() for site in self.head])
        self.information = self._information(self._feed(train).whole())

    def predict(self, rows: Dataset, scale: float, samples: int) -> AnyForecast:
        """The forecast of rows, from so many draws of the head."""
        units = torch.cat([site.unit.expand(site.shape).flatten() for site in self.head])
        precision = self.information + (scale * units.to(self.loc)).pow(-2).diag()
        normal = dist.MultivariateNormal(self.loc, precision_matrix=precision)

        def guide(batch: Batch | None = None) -> None:
            flat = pyro.sample("head", normal, infer={"is_auxiliary": True})
            for name, value in (self.weights | self._unpacked(flat)).items():
                own = self.weights[name].dim()
                pyro.sample(name, dist.Delta(value, event_dim=own))

        seed = self.posterior.report.options.seed
        return predict(self.model, guide, self._feed(rows), samples, seed=seed, keep_samples=True)

    def _feed(self, rows: Dataset) -> Feed:
        examples = self.posterior.text.encode(self.model, rows, labelled=False)
        return Feed(self.model, examples, frozen=True, weights=self.weights)

    def _unpacked(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([site.numel for site in self.head], -1)
        return {
            site.name: part.reshape(*part.shape[:-1], *site.shape)
            for site, part in zip(self.head, parts, strict=True)
        }

    def _information(self, batch: Batch) -> Tensor:
        batch = batch.to(self.loc.device)
        flat = self.loc.clone().requires_grad_()
        with torch.no_grad():
            fitted = self.model.predictive(self.weights, batch)
        moved = self.model.predictive(self.weights | self._unpacked(flat), batch)
        found: Tensor = hessian(kl_divergence(fitted, moved).sum(), flat)
        return (found + found.T) / 2
