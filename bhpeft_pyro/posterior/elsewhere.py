"""Posteriors of guides and draws that were fitted elsewhere, by Pyro's SVI or a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..data import Columns
from ..guides import DrawsGuide, check_made_for
from ..guides.guide import components_of
from ..guides.registry import trained_by_pyro
from ..inference.loop import as_module
from ..inference.report import FitReport
from ..model.model import Model, check_model
from ..options import FitOptions
from .posterior import MixturePosterior, Posterior

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

    >>> from bhpeft_pyro.guides import NormalGuide
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model()
    >>> Posterior.of(model, NormalGuide(model)).predict(["w5 w6"]).probabilities.shape
    torch.Size([1, 2])
    """
    check_model(model)
    made = trained_by_pyro(as_module(guide), model)
    check_made_for(model, made)
    if len(guides := components_of(made)) > 1:
        parts = [of(model, part, data, columns) for part in guides]
        return MixturePosterior.joined(parts, parts[0].report.options)
    report = FitReport(0, "", FitOptions())
    if data is not None:
        examples = model.encode(data, columns, new_names=True)
        columns = model.columns_of(examples, columns)
        report = FitReport(len(examples), examples.fingerprint, FitOptions())
    return Posterior(model, made, (report,), columns, model.prior)


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
        GuideError: a latent is missing or unknown, shapes differ, or a value is not possible.

    >>> import torch
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model(())
    >>> draws = {site.name: torch.randn(20, *site.shape) for site in model.sites}
    >>> Posterior.from_draws(model, draws).predict(["w5 w6"]).probabilities.shape
    torch.Size([1, 2])
    """
    if not chains:
        return of(model, DrawsGuide.of(model, draws), data, columns)
    count = len(next(iter(draws.values())))
    every = [{name: value[i] for name, value in draws.items()} for i in range(count)]
    parts = [from_draws(model, each, data, columns) for each in every]
    return MixturePosterior.joined(parts, parts[0].report.options)
