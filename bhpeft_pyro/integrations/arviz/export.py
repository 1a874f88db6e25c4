"""`to_arviz`: the groups of an export, and that they fit in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
import torch
import xarray as xr
from torch import Tensor

from ...base.checks import MAYBE_COUNT, SAMPLES, SEED, check, derived
from ...base.names import matching
from ...data import Columns, Examples
from ...errors import ConfigError
from ...guides import DrawsGuide, Guide, PriorGuide, prior_like
from ...model.cached_batches import CachedBatches
from ...model.model import Model
from ...posterior.posterior import Posterior
from ...prediction.draws import draw_parts, private_rng
from ...prediction.predict import simulate
from ...training.report import FitReport
from .variables import chosen_draws, dataset, variables

with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

SMALL = 10_000
"""Variables with more numbers per draw than this are left out unless they are named."""

_SAMPLES = 100
_FLOAT, _INTEGER = 4, 8  # bytes

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


def to_arviz(
    posterior: Posterior | Model,
    data: object | None = None,
    *,
    samples: int | None = None,
    sites: str | Sequence[str] | None = None,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> Any:
    """Draws of a posterior, and what they predict, in ArviZ's form.

    Groups: `posterior` and `prior`, with one variable per site, dims `(chain, draw, *site dims)`,
    and what a person can read in the weights (`variables`); `sample_stats`, the last round's trace
    (dim `step`) and the KL of each site (nats, dim `site`), or of a sampler's draws its statistics
    (dims `(chain, draw)`). With data also `posterior_predictive`,
    `prior_predictive`, `constant_data` (the texts) and, if labelled, `observed_data` and
    `log_likelihood`, over the dim `example`. Draw s of a group belongs to draw s of the weights.

    A sampler's draws come once each, in its order and chains (`Posterior.from_draws`). Otherwise a
    mixture has a chain for each component: chains that differ are modes that differ. Under a
    linear guide the prior, too, predicts with the linearised network; for a mixture, with each
    component's, in turn.

    Of a model, before any fit, the export has the groups of its prior and of the data.

    Args:
        posterior: the posterior, or a model.
        data: as for `Posterior.predict`.
        samples: S, draws per chain; by default 100, or all of a sampler's. Fewer of a sampler's
            are a random part of them, in their order.
        sites: patterns of variables' names, such as "lora.*" or "change.*"; by default all of at
            most `SMALL` numbers. Those left out are named in the attribute `left_out` of
            `posterior`.
        max_bytes: the most that the arrays may take.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: a pattern matches nothing, the arrays would exceed `max_bytes`, or a sampler
            has made fewer than `samples` draws.

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
    samples, seed = MAYBE_COUNT("samples", samples), SEED("seed", seed)
    max_bytes = SAMPLES("max_bytes", max_bytes)
    check(posterior, Posterior | Model, "posterior", "a bh.Posterior, or a bh.Model")
    chains: Sequence[Guide]
    prior: Guide
    if isinstance(posterior, Model):
        model, columns, chains, prior = posterior, Columns(), (), PriorGuide(posterior)
    else:
        model, columns = posterior.model, posterior.columns
        # Components come from independent fits and count alike.
        chains, prior = posterior.guide.components, prior_like(model, posterior.guide)
    sampled = [each for each in chains if isinstance(each, DrawsGuide)]
    most = min((each.samples for each in sampled), default=None)
    if samples is None:
        samples = most or _SAMPLES
    elif most is not None and samples > most:
        raise ConfigError(
            f"samples={samples}: the sampler made {most} draws in each chain; expected at most that"
        )
    examples = None
    if data is not None:
        examples = model.encode(data, columns, labelled=False, new_names=not chains)
    guides = [*chains, prior]
    known = variables(model, next(draw_parts(model, guides[0], 1, seed)))
    chosen = [name for name, each in known.items() if each.numel <= SMALL]
    if sites is not None:
        chosen = matching(known, sites, "sites")
    if not chosen:
        raise ConfigError("sites: no variable is chosen; expected a pattern, such as 'head.*'")
    numbers = len(guides) * sum(known[name].numel for name in chosen)
    needed = samples * _FLOAT * numbers
    if examples is not None:  # labels of guides and prior, and log-likelihoods
        several = model.network.outputs if examples.kind == "labels" else 1
        each = _INTEGER * len(guides) * several + _FLOAT * len(chains)
        needed += samples * len(examples) * each
    if needed > max_bytes:
        raise ConfigError(
            f"sites, samples={samples}: {needed:,} bytes needed, but max_bytes={max_bytes:,}; take "
            f"fewer samples or name fewer sites (chosen: {', '.join(chosen)})"
        )
    *drawn_chains, drawn_prior = [
        chosen_draws(model, guide, chosen, samples, derived(seed, i))
        for i, guide in enumerate(guides)
    ]
    names = columns.label_names
    left_out = ", ".join(name for name in known if name not in chosen)
    groups = {"prior": dataset([drawn_prior], names, left_out=left_out)}
    if not isinstance(posterior, Model):
        report = posterior.report
        about = {"guide": posterior.facts["guide"], "round": len(posterior.lineage)}
        about |= {"temperature": report.temperature, "examples": report.examples}
        own = dataset(drawn_chains, names, left_out=left_out, **about)
        said = [each.statistics(samples, derived(seed, i)) for i, each in enumerate(sampled)]
        stats = _statistics(said) if sampled else trace(report)
        groups = {"posterior": own, **groups} | ({"sample_stats": stats} if stats else {})
    if examples is not None:
        groups |= _predictions(model, guides, examples, samples, seed)
    for group in groups.values():
        group.attrs["inference_library"] = "bhpeft_pyro"
    if "InferenceData" in vars(arviz):  # ArviZ 1.3 gives a DataTree the old name
        return arviz.InferenceData(**dict[str, Any](groups))
    return xr.DataTree.from_dict(groups)


def trace(report: FitReport) -> xr.Dataset:
    """(step,) traces, NaN where a quantity was not evaluated, and (site,) numbers at the end.

    >>> from bhpeft_pyro.base.fit_options import FitOptions
    >>> report = FitReport(9, "", FitOptions(), steps=3, history=[{"step": 1, "loss": 2.0},
    ...                                                           {"step": 3, "loss": 1.0}])
    >>> trace(report)["loss"].values, trace(report)["skipped"].values
    (array([ 2., nan,  1.]), array([False,  True, False]))
    """
    # The entries of components are means, over the steps that each of them took.
    count = max((each.steps for each in report.components), default=report.steps)
    steps = pandas.RangeIndex(1, count + 1, name="step")
    table = pandas.DataFrame(report.history, columns=["step", *_STEPS]).set_index("step")
    group = xr.Dataset(coords={"step": steps.to_numpy()})
    called = _STEPS if report.pull is None else _STEPS | _OF_POINTS
    for name, values in table.reindex(steps).dropna(axis="columns", how="all").items():
        group[name] = ("step", values.to_numpy(float), {"long_name": called[str(name)]})
    words = "left out, because loss or gradient were not finite"
    group["skipped"] = ("step", ~steps.isin(table.index), {"long_name": words})
    by_site = pandas.DataFrame({"kl": report.marginal_kl | report.kl, "scale": report.scales})
    group = group.assign_coords(site=[*by_site.index])
    for name, words in (
        ("kl", "minus log prior density (nats)" if report.points else "KL to the prior (nats)"),
        ("scale", "posterior sd / prior sd, geometric mean"),
    ):
        group[f"site_{name}"] = ("site", by_site[name].to_numpy(float), {"long_name": words})
    return group


def _statistics(chains: Sequence[Mapping[str, Tensor]]) -> xr.Dataset:
    """What a sampler says of its draws, (chain, draw)."""
    found = xr.Dataset()
    for name in chains[0]:
        values = np.stack([chain[name] for chain in chains])
        found[name] = ("chain", "draw"), values.astype(bool) if name == "diverging" else values
    return found.assign_coords({dim: np.arange(size) for dim, size in found.sizes.items()})


def _predictions(
    model: Model, guides: Sequence[Guide], examples: Examples, samples: int, seed: int
) -> dict[str, xr.Dataset]:
    """Labels drawn from the likelihood under the draws of each guide, the last one being the
    prior, and the log-likelihoods of the observed labels."""
    feed = CachedBatches(model, examples)

    def group(*dims: str, **values: np.ndarray) -> xr.Dataset:
        """Arrays over `dims`, and over "output" where a text may have several labels."""
        own = {name: ((*dims, "output")[: value.ndim], value) for name, value in values.items()}
        found = xr.Dataset(own)
        coords: dict[str, Any] = {str(dim): range(size) for dim, size in found.sizes.items()}
        if "output" in coords and examples.label_names is not None:
            coords["output"] = [*examples.label_names]
        return found.assign_coords(coords)

    def chains_of(values: Sequence[Tensor]) -> xr.Dataset:
        return group("chain", "draw", "example", label=torch.stack([*values]).numpy())

    outcomes = []
    for number, guide in enumerate(guides):
        own = derived(seed, number)  # as the weights' draws have
        with private_rng(own):
            outcomes.append(simulate(model, draw_parts(model, guide, samples, own), feed))
    *chains, prior = outcomes
    groups = {
        "prior_predictive": chains_of([prior[0]]),
        "constant_data": group("example", text=np.array(examples.texts, dtype=object)),
    }
    if chains:
        groups["posterior_predictive"] = chains_of([labels for labels, *_ in chains])
    if examples.labels is not None:
        groups["observed_data"] = group("example", label=examples.labels.numpy())
        if chains:
            groups["log_likelihood"] = chains_of([fit for _, fit in chains])
    return groups
