"""Monte Carlo dropout as a guide: weights times random masks (Gal and Ghahramani 2016)."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.model.model import Model

__all__ = ["dropout"]


def dropout(model: Model, rate: float = 0.1) -> Callable[[Batch | None], None]:
    """A guide function that drops the inputs of each down-projection and of the head.

    Dropping an entry of an input is dropping a column of the weights that multiply it. What
    is kept is multiplied by 1 / (1 - rate), so the mean is the point.

    Args:
        model: the model.
        rate: the share that is dropped.

    >>> from bhpeft_pyro.posterior.fit import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model()
    >>> posterior = fit(model, dropout(model, 0.5), tiny_examples(), max_steps=2, progress=False)
    >>> weight = posterior.sample(50)["head.weight"]
    >>> 0.3 < float((weight == 0).float().mean()) < 0.7
    True
    """
    sites = model.sites

    def guide(batch: Batch | None = None) -> None:
        for site in sites:
            start = site.init().to(model.network.device)
            value = pyro.param(f"{site.name}.point", start)
            if site.dims[-1:] in (("in",), ("feature",)):
                shape = torch.Size((*[1] * (site.ndim - 1), site.shape[-1]))
                kept = dist.Bernoulli(value.new_tensor(1 - rate)).expand(shape)
                mask = pyro.sample(
                    f"{site.name}.mask",
                    kept.to_event(site.ndim),
                    infer={"is_auxiliary": True},
                )
                anchor = model.network.coordinates.anchor(site.name)
                at = torch.zeros_like(value) if anchor is None else anchor
                value = (at + value) * mask / (1 - rate) - at  # columns of the weights themselves
            pyro.sample(site.name, dist.Delta(value, event_dim=site.ndim))

    return guide
