"""Posteriors for ArviZ: `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x), with named dims.

The draws of a fitted guide are independent, so r_hat and effective sample sizes say nothing about
how well the guide fits. The export is for summaries and plots by layer or label, prior against
posterior, posterior predictive checks, and PSIS-LOO.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import torch
import xarray as xr
from torch import Tensor

from ..base.checks import warn
from ..base.isolation import seeded
from ..base.names import matching
from ..base.values import Count, Seed, checked_call, derived
from ..data import Columns, Examples
from ..diagnostics.changes import Variable, variables
from ..diagnostics.psis import log_prior
from ..errors import ConfigError, PriorError
from ..guides import Guide, PriorGuide, prior_like
from ..model.cached_batches import CachedBatches
from ..model.model import Model
from ..posterior.posterior import Posterior
from ..prediction.draws import draw_parts
from ..prediction.predict import simulate
from ..training.report import FitReport

with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

__all__ = ["SMALL", "to_arviz"]

SMALL = 10_000
"""Variables with more numbers per draw than this are left out unless they are named."""

_SAMPLES = 100

# ArviZ 1.x labels the rows of its tables correctly only if each variable's dims come in the order
# in which dims first appear in the dataset. Sorted by these, the variables' do.
_ORDER = ("layer", "position", "out", "rank", "bottleneck", "in", "output", "feature")

_STEPS = {
    "loss": "negative ELBO (nats per example)",
    "nll": "expected NLL (nats per example)",
    "kl": "KL to the prior (nats per example)",
    "temperature": "weight of the KL",
    "lr": "learning rate",
    "gradient": "norm of the gradient (nats per example)",
    "validation_nll": "NLL of the validation data (nats per example)",
}
_OF_POINTS = {
    "loss": "NLL + penalty of the prior (nats per example)",
    "nll": "NLL (nats per example)",
    "kl": "penalty of the prior (nats per example)",
    "temperature": "weight of the penalty",
}


@checked_call
def to_arviz(
    posterior: Posterior | Model,
    data: object | None = None,
    *,
    samples: Count | None = None,
    sites: str | Sequence[str] | None = None,
    seed: Seed = 0,
) -> Any:
    """Draws of a posterior, and what they predict, in ArviZ's form.

    Groups: `posterior` and `prior`, with one variable per site, dims `(chain, draw, *site dims)`,
    and what a person can read in the weights (docs/diagnostics.md); `sample_stats`, the last
    round's trace (dim `step`) and the KL of each site (nats, dim `site`), or of a sampler's draws
    its statistics (dims `(chain, draw)`); `log_prior`, the log-density of the prior of the round at
    each draw. With data also `posterior_predictive`, `prior_predictive`, `constant_data` (the texts
    and their `novelty`) and, if labelled, `observed_data` and `log_likelihood`, over the dim
    `example`. Draw s of a group belongs to draw
    s of the weights.

    A sampler's draws come once each, in its order and chains (`Posterior.from_draws`). Otherwise a
    mixture has a chain for each component: chains that differ are modes that differ. Under a
    linear guide the prior, too, predicts with the linearised network; for a mixture, with each
    component's, in turn.

    Of a model, before any fit, the export has the groups of its prior and of the data.

    Args:
        posterior: the posterior, or a model.
        data: as for `Posterior.predict`.
        samples: S, draws per chain; by default 100, or all of a sampler's. Fewer of a sampler's
            are a random part of them, in their order. Under a mixture for a prior its groups have
            the next multiple of the number of components.
        sites: patterns of variables' names, such as "lora.*" or "change.*"; by default all of at
            most `SMALL` numbers. Those left out are named in the attribute `left_out` of
            `posterior`.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: a pattern matches nothing, or a sampler has made fewer than `samples` draws.
        PriorError: of a model alone: its prior has observations or factors.

    >>> from bhpeft_pyro.posterior.fit import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> idata = to_arviz(fitted, tiny_examples(5), samples=10)
    >>> dict(idata.posterior["head.weight"].sizes)
    {'chain': 1, 'draw': 10, 'output': 2, 'feature': 16}
    >>> idata.posterior["change.lora.query"].dims
    ('chain', 'draw', 'layer')
    >>> idata.log_likelihood["label"].shape
    (1, 10, 5)
    """
    chains: Sequence[Guide]
    priors: Sequence[Guide]
    if isinstance(posterior, Model):
        model, columns, chains, priors = posterior, Columns(), (), [PriorGuide(posterior)]
    else:
        model, columns, priors = posterior.model, posterior.columns, ()
        chains = posterior.guides  # they come from independent fits and count alike
        try:
            priors = [prior_like(part.model, part.guide) for part in posterior.components]
        except PriorError as error:
            warn(f"{error}; the groups of the prior are left out")
    most = min((guide.draws_kept for guide in chains if guide.draws_kept is not None), default=None)
    if samples is None:
        samples = most or _SAMPLES
    elif most is not None and samples > most:
        raise ConfigError(
            f"samples={samples}: the sampler made {most} draws in each chain; expected at most that"
        )
    examples = None
    if data is not None:
        examples = model.encode(data, columns, labelled=False)
    guides = [*chains, *priors]
    readable = variables(model, next(draw_parts(model, guides[0], 1, seed)))
    chosen = [name for name, variable in readable.items() if variable.numel <= SMALL]
    if sites is not None:
        chosen = matching(readable, sites, "sites")
    if not chosen:
        raise ConfigError("sites: no variable is chosen; expected a pattern, such as 'head.*'")
    drawn = [
        _chosen_draws(model, guide, chosen, samples, derived(seed, i))
        for i, guide in enumerate(guides)
    ]
    of_chains, of_prior = drawn[: len(chains)], drawn[len(chains) :]
    names = columns.label_names
    left_out = ", ".join(name for name in readable if name not in chosen)
    groups = {"prior": _dataset(of_prior, names, left_out=left_out)} if of_prior else {}
    if not isinstance(posterior, Model):
        report = posterior.report
        about = {"guide": posterior.facts["guide"], "round": len(posterior.lineage)}
        about |= {"temperature": report.temperature, "examples": report.examples}
        groups = {"posterior": _dataset(of_chains, names, left_out=left_out, **about), **groups}
        if priors:
            groups["log_prior"] = _log_priors(posterior, samples, seed)
        stats = trace(report)
        if most is not None:
            stats = _statistics(
                [c.statistics(samples, derived(seed, i)) for i, c in enumerate(chains)]
            )
        if stats:
            groups["sample_stats"] = stats
    if examples is not None:
        groups |= _predictions(model, chains, priors, examples, samples, seed)
        novelty = None if isinstance(posterior, Model) else posterior.novelty
        if novelty is not None and novelty.enough:
            words = {"long_name": "p-value, small for texts unlike the learnt ones"}
            p = novelty.p_values(model, examples).numpy()
            groups["constant_data"]["novelty"] = ("example", p, words)
    for group in groups.values():
        group.attrs["inference_library"] = "bhpeft_pyro"
    if "InferenceData" in vars(arviz):  # ArviZ 1.3 gives a DataTree the old name
        return arviz.InferenceData(**dict[str, Any](groups))
    return xr.DataTree.from_dict(groups)


def psislw(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Normalised Pareto-smoothed log-weights and k-hat of (S,) log importance ratios.

    Where most of the tail is equal, ArviZ 1 has no k-hat, and no smooth weights: it is infinite
    here, and the weights are those of the ratios.
    """
    if hasattr(arviz, "psislw"):
        smooth, k_hat = arviz.psislw(log_ratios)
    else:
        from arviz_stats.base import array_stats

        smooth, k_hat = array_stats.psislw(-log_ratios)  # it takes log-likelihoods
    if np.isnan(k_hat):
        return log_ratios - np.logaddexp.reduce(log_ratios), np.inf
    return smooth, float(k_hat)


def _chosen_draws(
    model: Model, guide: Guide, chosen: Sequence[str], samples: int, seed: int
) -> dict[str, Variable]:
    """S draws of the chosen variables, on the CPU; of the others, a few draws at a time."""
    parts = []
    for draws in draw_parts(model, guide, samples, seed):
        readable = variables(model, draws)
        parts.append(
            {name: replace(readable[name], values=readable[name].values.cpu()) for name in chosen}
        )
    return {
        name: replace(first, values=torch.cat([part[name].values for part in parts]))
        for name, first in parts[0].items()
    }


def _log_priors(posterior: Posterior, samples: int, seed: int) -> xr.Dataset:
    """The log-density of all weights together under the round's prior, by (chain, draw)."""
    chains = [
        log_prior(part.guide.under_prior(part.model), part.guide, samples, derived(seed, number))
        for number, part in enumerate(posterior.components)
    ]
    return _counted(("chain", "draw"), {"weights": torch.stack(chains).numpy()})


def _dataset(
    chains: Sequence[Mapping[str, Variable]], label_names: Sequence[str] | None, **attrs: Any
) -> xr.Dataset:
    """A group with dims (chain, draw, ...), from the variables of each chain.

    A name that two variables use for dims of different size or coordinates (such as the layers of
    a subset) becomes one name per variable: "layer.adapter.up".
    """
    coords = {name: _coordinates(variable, label_names) for name, variable in chains[0].items()}
    uses: dict[str, set[tuple[Hashable, ...]]] = {}
    for by_dim in coords.values():
        for dim, along in by_dim.items():
            uses.setdefault(dim, set()).add(along)

    def place(name: str) -> list[int]:
        dims = [dim if len(uses[dim]) == 1 else "" for dim in coords[name]]
        return [_ORDER.index(dim) if dim in _ORDER else len(_ORDER) for dim in dims]

    arrays = {}
    for name in sorted(coords, key=place):
        values = np.stack([chain[name].values.numpy() for chain in chains])
        named = {
            dim if len(uses[dim]) == 1 else f"{dim}.{name}": [*along]
            for dim, along in coords[name].items()
        }
        # What your own prior samples besides the sites has dims without names.
        dims = [*named] or [f"{name}_dim_{i}" for i in range(values.ndim - 2)]
        arrays[name] = xr.DataArray(values, named, ["chain", "draw", *dims])
    group = xr.Dataset(arrays, attrs=attrs)
    return group.assign_coords({dim: np.arange(group.sizes[dim]) for dim in ("chain", "draw")})


def _coordinates(
    variable: Variable, label_names: Sequence[str] | None
) -> dict[str, tuple[Hashable, ...]]:
    """By dim; along "output" the labels' names, if there are as many."""
    coords: dict[str, tuple[Hashable, ...]] = {}
    for dim, size in zip(variable.dims, variable.values.shape[1:], strict=bool(variable.dims)):
        coords[dim] = tuple(range(size))
        if dim == "layer":
            coords[dim] = variable.layers
        elif dim == "output" and label_names is not None and len(label_names) == size:
            coords[dim] = tuple(label_names)
    return coords


def trace(report: FitReport) -> xr.Dataset:
    """(step,) traces, NaN where a quantity was not evaluated, and (site,) numbers at the end."""
    # The entries of components are means, over the steps that each of them took.
    count = max((part.steps for part in report.components), default=report.steps)
    steps = pandas.RangeIndex(1, count + 1, name="step")
    table = pandas.DataFrame(report.history, columns=["step", *_STEPS]).set_index("step")
    group = xr.Dataset(coords={"step": steps.to_numpy()})
    called = _STEPS | _OF_POINTS if report.point else _STEPS
    for name, values in table.reindex(steps).dropna(axis="columns", how="all").items():
        group[name] = ("step", values.to_numpy(float), {"long_name": called[str(name)]})
    words = "left out, because loss or gradient were not finite"
    group["skipped"] = ("step", ~steps.isin(table.index), {"long_name": words})
    by_site = pandas.DataFrame({"kl": report.marginal_kl | report.kl, "scale": report.scales})
    group = group.assign_coords(site=[*by_site.index])
    points, kl = by_site.index.isin(report.points), "KL to the prior (nats)"
    if points.any():
        of_points = "minus log prior density (nats)"
        kl = of_points if points.all() else f"{kl}; of points {of_points}"
        if not points.all():
            group["site_point"] = ("site", points, {"long_name": "a point estimate"})
    for name, words in (("kl", kl), ("scale", "posterior sd / prior sd, geometric mean")):
        group[f"site_{name}"] = ("site", by_site[name].to_numpy(float), {"long_name": words})
    return group


def _statistics(chains: Sequence[Mapping[str, Tensor]]) -> xr.Dataset:
    """A sampler's statistics of its draws, (chain, draw)."""
    arrays = {name: np.stack([chain[name] for chain in chains]) for name in chains[0]}
    if "diverging" in arrays:
        arrays["diverging"] = arrays["diverging"].astype(bool)
    return _counted(("chain", "draw"), arrays)


def _counted(dims: Sequence[str], arrays: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Arrays over the first of the dims, as many as each has, counted from 0."""
    group = xr.Dataset({name: (dims[: value.ndim], value) for name, value in arrays.items()})
    return group.assign_coords({str(dim): range(size) for dim, size in group.sizes.items()})


def _predictions(
    model: Model,
    chains: Sequence[Guide],
    priors: Sequence[Guide],
    examples: Examples,
    samples: int,
    seed: int,
) -> dict[str, xr.Dataset]:
    """Labels drawn from the likelihood under the draws of each guide and of the prior, and the
    log-likelihoods of the observed labels."""
    batches = CachedBatches(model, examples)

    def group(*dims: str, **arrays: np.ndarray) -> xr.Dataset:
        """Arrays over `dims`, and over "output" where a text may have several labels."""
        counted = _counted((*dims, "output"), arrays)
        if "output" in counted.dims and examples.label_names is not None:
            counted = counted.assign_coords(output=[*examples.label_names])
        return counted

    def of_chains(values: Sequence[Tensor]) -> xr.Dataset:
        return group("chain", "draw", "example", label=torch.stack([*values]).numpy())

    outcomes = []
    for number, guide in enumerate([*chains, *priors]):
        of_guide = derived(seed, number)  # as the weights' draws have
        with seeded(of_guide):
            outcomes.append(simulate(model, draw_parts(model, guide, samples, of_guide), batches))
    groups = {"prior_predictive": of_chains([outcomes[-1][0]])} if priors else {}
    groups["constant_data"] = group("example", text=np.array(examples.texts, dtype=object))
    if chains:
        outcomes = outcomes[: len(chains)]
        groups["posterior_predictive"] = of_chains([labels for labels, *_ in outcomes])
    if examples.labels is not None:
        groups["observed_data"] = group("example", label=examples.labels.numpy())
        if chains:
            groups["log_likelihood"] = of_chains([fit for _, fit in outcomes])
    return groups
