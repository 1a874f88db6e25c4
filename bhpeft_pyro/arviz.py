"""Posteriors for ArviZ: `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x), with named dims.

The draws of a fitted guide are independent, so there is one chain, and r_hat or effective sample
sizes say nothing about how well the guide fits. What the export is good for: summaries and
plots by layer or label, prior against posterior, posterior predictive checks, PSIS-LOO.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from . import change
from .data import Examples
from .errors import ConfigError
from .forecast import RatingForecast
from .inference.draws import blocks, seeded
from .inference.predict import predict
from .peft.sites import Site

with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["SMALL", "to_arviz"]

SMALL = 10_000
"""Sites with more weights than this are left out unless they are named."""

_FLOAT = 4  # bytes
_PREDICTED = 12  # bytes for each draw and example: a label and a log-likelihood
_TRACE = ("loss", "nll", "kl", "lr", "gradient", "validation_nll")


def to_arviz(
    posterior: Posterior,
    data: object | None = None,
    *,
    samples: int = 100,
    sites: str | Sequence[str] | None = None,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> Any:
    """Draws of a posterior, and what they predict, in ArviZ's form.

    Groups: `posterior` and `prior`, one variable a site, dims (chain, draw, *site dims), and one a
    PEFT branch, `change.adapter` for example, with the size of the change that it makes in each
    layer (`change.sizes`); `sample_stats`, the last round's loss, NLL, KL per step (nats per
    example, dim `step`) and the KL of each site (nats, dim `site`); and with data
    `posterior_predictive`, `constant_data` (the texts) and, if labelled, `observed_data` and
    `log_likelihood`, over the dim `example`. Draw s of every group but the prior belongs to draw s
    of the weights.

    Args:
        posterior: the posterior.
        data: as for `Posterior.predict`.
        samples: S.
        sites: patterns of site names, such as "lora.*" or "change.*"; by default the changes and
            the sites of at most `SMALL` weights. Those left out are named in the attribute
            `left_out` of `posterior`.
        max_bytes: the most that the arrays may take.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: a pattern matches no site, or the arrays would exceed `max_bytes`.

    >>> from bhpeft_pyro.fitting import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> idata = to_arviz(fitted, tiny_examples(5), samples=10)
    >>> dict(idata.posterior["head.weight"].sizes)
    {'chain': 1, 'draw': 10, 'label': 2, 'in': 16}
    >>> idata.log_likelihood["label"].shape
    (1, 10, 5)
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    examples = None
    if data is not None:
        examples = posterior.text.encode(posterior.model, data, labelled=False)
    one = posterior.sample(1, seed)
    numel = {name: value[0].numel() for name, value in one.items()}
    branches = _branches(posterior, one)
    numel |= {branch.name: branch.shape[0] for branch in branches}
    chosen = _choose(numel, sites)
    outputs = max(2, posterior.model.network.outputs)
    needed = samples * (
        2 * _FLOAT * sum(numel[name] for name in chosen)
        + (0 if examples is None else (_PREDICTED + _FLOAT * outputs) * len(examples))
    )
    if needed > max_bytes:
        raise ConfigError(
            f"sites, samples={samples}: {needed:,} bytes needed, but max_bytes={max_bytes:,}; take "
            f"fewer samples or name fewer sites (chosen: {', '.join(chosen)})"
        )
    values: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for block in blocks(posterior.model, posterior.guide, samples, seed):  # never all of all draws
        drawn = _with_changes(posterior, {name: value[:, 0] for name, value in block.items()})
        for name in chosen:
            values[name].append(drawn[name].cpu())
    known = (*posterior.model.sites, *branches)
    axes = _Axes([site for site in known if site.name in chosen], posterior)
    report = posterior.report
    attrs = {
        "left_out": ", ".join(name for name in numel if name not in chosen),
        "guide": type(posterior.guide).__name__,
        "round": len(posterior.lineage),
        "temperature": report.temperature,
        "examples": report.examples,
    }
    groups = {
        "posterior": axes.dataset({name: torch.cat(v) for name, v in values.items()}, attrs),
        "prior": axes.dataset(_prior(posterior, chosen, samples, seed), {}),
        "sample_stats": _trace(report.history, report.kl),
    }
    if examples is not None:
        groups |= _predictions(posterior, examples, samples, seed)
    for group in groups.values():
        group.attrs["inference_library"] = "bhpeft_pyro"
    return _join(groups)


def _choose(numel: Mapping[str, int], sites: str | Sequence[str] | None) -> list[str]:
    if sites is None:
        return [name for name, count in numel.items() if count <= SMALL]
    patterns = [sites] if isinstance(sites, str) else list(sites)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in numel):
            raise ConfigError(f"sites: {pattern!r} matches no site; sites: {', '.join(numel)}")
    return [name for name in numel if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _prior(posterior: Posterior, chosen: list[str], samples: int, seed: int) -> dict[str, Tensor]:
    """Draws of the prior in force in the last round: site name to (S, *shape)."""
    model = posterior.model
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    with seeded(seed), torch.no_grad(), poutine.block():
        for _ in range(samples):
            trace = poutine.trace(model.prior).get_trace(model.sites)
            names = {*chosen, *(site.name for site in model.sites)} & trace.nodes.keys()
            drawn: dict[str, Tensor] = {}
            for name in names:
                value = trace.nodes[name]["value"]
                assert isinstance(value, Tensor)
                drawn[name] = value[None]
            drawn = _with_changes(posterior, drawn)
            for name in chosen:
                found[name].append(drawn[name][0].cpu())
    return {name: torch.stack(values) for name, values in found.items()}


def _sizes(posterior: Posterior, weights: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    network = posterior.model.network
    if not network.kinds:
        return {}
    return change.sizes(network, change.of_transformer(network, weights))


def _with_changes(posterior: Posterior, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """(S, *shape) weights, and (S, layers) for each PEFT branch."""
    return weights | {
        f"change.{branch}": torch.stack([layers[n] for n in sorted(layers)], 1)
        for branch, layers in _sizes(posterior, weights).items()
    }


def _branches(posterior: Posterior, weights: dict[str, Tensor]) -> list[Site]:
    """The changes of `_with_changes` as if they were sites, for their names and layers."""
    return [
        Site(
            f"change.{branch}",
            (len(layers),),
            ("layer",),
            torch.ones(1),
            lambda: torch.zeros(1),
            layers=tuple(sorted(layers)),
        )
        for branch, layers in _sizes(posterior, weights).items()
    ]


class _Axes:
    """Names and coordinates of the sites' dims.

    A name that two sites use for dims of different size or coordinates (the layers of a subset,
    say) becomes one name a site, "layer.adapter.up".
    """

    def __init__(self, sites: Sequence[Site], posterior: Posterior) -> None:
        self.dims: dict[str, tuple[str, ...]] = {}
        self.coords: dict[str, Any] = {}
        found: dict[str, set[tuple[Hashable, ...]]] = {}
        for site in sites:
            for dim, size in zip(site.dims, site.shape, strict=True):
                found.setdefault(dim, set()).add(_coordinates(dim, size, site, posterior))
        for site in sites:
            names = []
            for dim, size in zip(site.dims, site.shape, strict=True):
                name = dim if len(found[dim]) == 1 else f"{dim}.{site.name}"
                names.append(name)
                self.coords[name] = list(_coordinates(dim, size, site, posterior))
            self.dims[site.name] = tuple(names)

    def dataset(self, values: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> xr.Dataset:
        """Variables (1, S, *shape) from (S, *shape)."""
        variables = {}
        for name, value in values.items():
            # What a prior samples besides the sites has dims without names.
            plain = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
            dims = ("chain", "draw", *self.dims.get(name, plain))
            variables[name] = (dims, value.cpu().numpy()[None])
        used = {dim for dims, _ in variables.values() for dim in dims}
        coords = {name: values for name, values in self.coords.items() if name in used}
        return _dataset(variables, coords, attrs)


def _coordinates(dim: str, size: int, site: Site, posterior: Posterior) -> tuple[Hashable, ...]:
    names = posterior.text.label_names
    if dim == "layer" and len(site.layers) == size:
        return site.layers
    if dim == "label" and names is not None and len(names) == size:
        return names
    return ("key", "value") if dim == "kv" else tuple(range(size))


def _trace(history: Sequence[Mapping[str, float]], kl: Mapping[str, float]) -> xr.Dataset:
    """(step,) traces, NaN where a quantity was not evaluated, and the (site,) KL at the end."""
    steps = np.array([entry["step"] for entry in history], dtype=np.int64)
    known = [name for name in _TRACE if any(name in entry for entry in history)]
    traces = {
        name: (("step",), np.array([entry.get(name, np.nan) for entry in history]))
        for name in known
    }
    sites = {"site_kl": (("site",), np.array(list(kl.values())))}
    return xr.Dataset(traces | sites, coords={"step": steps, "site": list(kl)})


def _predictions(
    posterior: Posterior, examples: Examples, samples: int, seed: int
) -> dict[str, xr.Dataset]:
    """A label drawn from each draw's own forecast, and how probable it made the observed one."""
    labels = examples.labels
    forecast = predict(
        posterior.model, posterior.guide, examples, samples, seed=seed, keep_samples=True
    )
    generator = torch.Generator().manual_seed(seed)
    if isinstance(forecast, RatingForecast):
        predicted = torch.normal(forecast.means, forecast.sds, generator=generator)
        normal = torch.distributions.Normal(forecast.means, forecast.sds)
        fit = None if labels is None else normal.log_prob(labels)
    else:
        p = forecast.samples
        assert p is not None
        predicted = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
        index = None if labels is None else labels.expand(len(p), -1).unsqueeze(-1)
        fit = None if index is None else p.gather(-1, index).squeeze(-1).log()
    coords = {"example": np.arange(len(examples))}
    by_draw = ("chain", "draw", "example")

    def drawn(values: Tensor) -> xr.Dataset:
        return _dataset({"label": (by_draw, values.numpy()[None])}, coords, {})

    groups = {
        "posterior_predictive": drawn(predicted),
        "constant_data": xr.Dataset(
            {"text": (("example",), np.array(examples.texts, dtype=object))}, coords
        ),
    }
    if labels is not None and fit is not None:
        groups["log_likelihood"] = drawn(fit)
        groups["observed_data"] = xr.Dataset({"label": (("example",), labels.numpy())}, coords)
    return groups


def _dataset(
    variables: Mapping[str, Any], coords: Mapping[str, Any], attrs: Mapping[str, Any]
) -> xr.Dataset:
    draws = next((value.shape[1] for _, value in variables.values()), 0)
    every = {"chain": np.arange(1), "draw": np.arange(draws), **coords}
    return xr.Dataset(dict(variables), coords=every, attrs=dict(attrs))


def _join(groups: dict[str, xr.Dataset]) -> Any:
    """The container of the installed ArviZ: all that differs between 0.x and 1.x."""
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(**dict[str, Any](groups))
    return xr.DataTree.from_dict(groups)
