"""Posteriors of guides and draws that were fitted elsewhere, by Pyro's SVI or a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..checks import check
from ..data import Columns
from ..errors import GuideError
from ..guides import DrawsGuide, MixtureGuide, as_guide, check_made_for
from ..guides.registry import trained_by_pyro
from ..inference.report import FitReport
from ..model.model import Model, check_model
from ..options import FitOptions
from ..priors.prior import check_prior
from .mixture import MixturePosterior
from .posterior import Posterior

__all__ = ["from_draws", "of"]


def of(
    model: Model,
    guide: nn.Module | Callable[..., Any],
    data: object | None = None,
    columns: Columns = Columns(),
) -> Posterior:
    """A posterior of a guide that `fit` has not trained, but for example Pyro's `SVI`.

    Args:
        model: the model that the guide was trained on.
        guide: any guide. A function's parameters are taken from Pyro's global store. One of
            Pyro's autoguides becomes a `guides.PyroGuide`, with a copy of its parameters, so
            that it can be saved and updated.
        data: what it has learnt, for the report, the names of the classes, and so that an
            update does not learn them again.
        columns: how data are read.

    Raises:
        ConfigError: `model` or `guide` is none.
        GuideError: the guide has no parameters, or was made for another model.
        PriorError: the prior cannot be used. If it has parameters, give the model one with their
            trained values.

    >>> from bhpeft_pyro.guides import NormalGuide
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model()
    >>> Posterior.of(model, NormalGuide(model)).predict(["w5 w6"]).probabilities.shape
    torch.Size([1, 2])
    """
    check_model(model)
    check_prior(model.prior, model.sites)
    guides = [trained_by_pyro(each, model) for each in as_guide(guide).components]
    for each in guides:
        check_made_for(model, each)
    learnt = 0, ""
    if data is not None:
        examples = model.encode(data, columns, new_names=True)
        columns = model.columns_of(examples, columns)
        learnt = len(examples), examples.fingerprint
    parts = [
        Posterior(model, each, (FitReport(*learnt, FitOptions()),), columns, model.prior)
        for each in guides
    ]
    return parts[0] if len(parts) == 1 else MixturePosterior.joined(parts, FitOptions())


def from_draws(
    model: Model,
    draws: Mapping[str, Tensor],
    data: object | None = None,
    columns: Columns = Columns(),
    *,
    chains: bool = False,
) -> Posterior:
    """A posterior of draws of any sampler: NUTS, SGLD, importance resampling.

    Its `as_prior` is independent Normals with the draws' means and sds; `update` needs a
    `guide` to train, such as "normal".

    Args:
        model: the model that was sampled.
        draws: for each latent `(S, *shape)`, as `MCMC.get_samples()` returns.
        data, columns: as for `of`.
        chains: the draws are `(C, S, *shape)`, of C chains, as
            `get_samples(group_by_chain=True)` returns; each becomes a component.

    Raises:
        GuideError: a latent is missing or unknown, shapes or numbers of chains differ, or a value
            is not possible.

    >>> import torch
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model(())
    >>> draws = {site.name: torch.randn(20, *site.shape) for site in model.sites}
    >>> Posterior.from_draws(model, draws).predict(["w5 w6"]).probabilities.shape
    torch.Size([1, 2])
    """
    check(draws, Mapping, "draws", "a tensor for each latent")
    for name, value in draws.items():
        check(value, Tensor, f"draws: {name!r}", "a tensor")
    if not chains:
        return of(model, DrawsGuide.of(model, draws), data, columns)
    counts = {len(value) if value.dim() else 0 for value in draws.values()}
    if len(counts) != 1:
        raise GuideError(f"draws: expected as many chains of each latent, got {sorted(counts)}")
    every = ({name: value[i] for name, value in draws.items()} for i in range(*counts))
    return of(model, MixtureGuide([DrawsGuide.of(model, each) for each in every]), data, columns)
