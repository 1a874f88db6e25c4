"""Posteriors of guides and draws that were fitted elsewhere, by Pyro's SVI or a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor, nn

from ..base.checks import shown
from ..base.fit_options import FitOptions
from ..data import Columns
from ..decisions.novelty import Novelty
from ..errors import ConfigError, GuideError
from ..guides import DrawsGuide, as_guide, check_made_for, latents
from ..guides.registry import check_sampled, trained_by_pyro
from ..model.model import Model, check_model
from ..priors.prior import check_prior
from ..training.report import FitReport
from .posterior import Posterior

__all__ = ["from_draws", "of"]


def of(
    model: Model,
    guide: nn.Module | Callable[..., Any] | Sequence[nn.Module],
    data: object | None = None,
    columns: Columns = Columns(),
) -> Posterior:
    """A posterior of a guide that `fit` has not trained, but for example Pyro's `SVI`.

    Args:
        model: the model that the guide was trained on.
        guide: any guide, or a list of one for each component; the posterior has copies. A
            function's parameters are taken from Pyro's global store. One of Pyro's autoguides
            becomes a `guides.PyroGuide`, which can be saved and updated; an AutoGaussian, and a
            flow with options of its own, stay themselves, so train them no further.
        data: what it has learnt, for the report, the names of the classes, `novelty`, and so that
            an update does not learn them again.
        columns: how data are read.

    Raises:
        ConfigError: `model` is not a `Model`, or `guide` not a guide.
        GuideError: the guide has no parameters, or was made for another model.
        PriorError: the prior cannot be used. If it has parameters, give the model one with their
            trained values.

    >>> from bhpeft_pyro.guides import MeanFieldGuide
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model()
    >>> Posterior.of(model, MeanFieldGuide(model)).predict(["w5 w6"]).probabilities.shape
    torch.Size([1, 2])
    """
    check_model(model)
    check_prior(model.prior, model.sites)
    if isinstance(guide, str | type):
        raise ConfigError(
            f"guide: expected a guide that is trained on this model already, got {shown(guide)}; "
            "bh.fit trains one"
        )
    several = guide if isinstance(guide, Sequence) else [guide]
    guides = [trained_by_pyro(as_guide(part), model) for part in several]
    for part in guides:
        check_made_for(model, part)
        check_sampled(model, part)
    learnt, rows, novelty = (0, ""), None, None
    if data is not None:
        examples = model.encode(data, columns)
        columns = model.columns_of(examples, columns)
        learnt, novelty = (len(examples), examples.fingerprint), Novelty.of(model, examples)
        rows = examples.hashes.unique()
    model.network.in_use = True
    reports = (FitReport(*learnt, FitOptions()),)
    first = [model.prior]
    parts = [
        Posterior(model, [part], reports, columns, first, first, learnt_rows=rows, novelty=novelty)
        for part in guides
    ]
    return parts[0] if len(parts) == 1 else Posterior.mixture(parts)


def from_draws(
    model: Model,
    draws: Mapping[str, Tensor] | MCMC,
    data: object | None = None,
    columns: Columns = Columns(),
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Posterior:
    """A posterior of draws of any sampler: NUTS, SGLD, importance resampling.

    Its `as_prior` is independent Normals with the draws' means and sds, under which `fit` learns
    new data with a guide to train, such as "normal". Several chains become its components.

    Args:
        model: the model that was sampled.
        draws: Pyro's `MCMC` after its run; or for each latent `(S, *shape)`, as
            `MCMC.get_samples()` returns, or `(C, S, *shape)` of C chains, as
            `get_samples(group_by_chain=True)` does.
        data, columns: as for `of`.
        statistics: what the sampler reports for each draw, under ArviZ's names (such as "energy" or
            "lp"): `(S,)`, or of several chains `(C, S)`. Exports have them as `sample_stats`. Of an
            `MCMC`, "diverging" is known.

    Raises:
        ConfigError: an argument is not of these types.
        GuideError: a latent is missing or unknown, shapes or numbers of chains differ, a value is
            not possible, or the `MCMC` has not run.

    >>> import torch
    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model(())
    >>> draws = {site.name: torch.randn(2, 20, *site.shape) for site in model.sites}
    >>> len(Posterior.from_draws(model, draws).components)
    2
    """
    check_model(model)
    said = dict({} if statistics is None else statistics)
    if isinstance(draws, MCMC):
        if draws.num_chains == 1:
            said = {
                name: value[None] if value.dim() == 1 else value for name, value in said.items()
            }
        draws, diverging = _sampled(draws)
        said = diverging | said
    values = dict(draws)
    shapes = {latent.name: tuple(latent.prior.event_shape) for latent in latents(model)}
    shapes |= {name: shape for latent in latents(model) for name, shape in latent.sites.items()}
    if {value.dim() - len(shapes[k]) for k, value in values.items() if k in shapes} != {2}:
        return of(model, DrawsGuide.of(model, values, said), data, columns)
    counts = {len(value) if value.dim() else 0 for value in values.values()}
    if len(counts) != 1:
        raise GuideError(f"draws: expected as many chains of each latent, got {sorted(counts)}")
    (chains,), samples = counts, max(values[k].shape[1] for k in values.keys() & shapes.keys())
    for name, value in said.items():
        if value.shape != (chains, samples):
            raise GuideError(
                f"statistics: {name!r} has shape {(*value.shape,)}, expected {(chains, samples)}"
            )
    guides = [DrawsGuide.of(model, _row(values, c), _row(said, c)) for c in range(chains)]
    return of(model, guides, data, columns)


def _row(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row] for name, value in tensors.items()}


def _sampled(mcmc: MCMC) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The draws by chain, and which of them ended a trajectory that diverged, if it is known."""
    draws = mcmc.get_samples(group_by_chain=True)
    if draws is None:
        raise GuideError("draws: this MCMC has no draws; expected one that has run")
    # Not by `diagnostics()`, which also takes the effective sample size of every weight.
    said: list[Any] = mcmc._diagnostics
    divergences = [chain.get("divergences") for chain in said]
    if None in divergences:  # a kernel of one's own
        return draws, {}
    diverging = torch.zeros(mcmc.num_chains, mcmc.num_samples)
    for row, steps in zip(diverging, divergences, strict=True):
        row[steps] = 1
    return draws, {"diverging": diverging}
