"""`to_arviz`: which draws are exported, and that they fit in memory.

How the last round's fit went: the group `sample_stats`.

What draws of the weights predict, and what was observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..data import Examples
from ..errors import ConfigError
from ..guides import prior_like
from ..guides.guide import is_linear
from ..inference.draws import draw, seeded
from ..inference.passes import Feed, drawn, passes
from ..inference.report import FitReport
from ..model.linearized import MAX_BYTES
from ..model.model import Model
from .variables import Axes, chains, chosen_draws, dataset, join, variables

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = [
    "SMALL",
    "predictions",
    "to_arviz",
    "trace",
]


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

    >>> from bhpeft_pyro.options import FitOptions
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


_DIMS = ("chain", "draw", "example")


def predictions(
    model: Model,
    guides: Sequence[Callable[..., Any]],
    examples: Examples,
    samples: int,
    seed: int,
) -> dict[str, xr.Dataset]:
    """A label drawn from the likelihood under each draw, and its log_prob of the observed one.

    Args:
        model: the model.
        guides: one a chain, and the prior last; draws have the seeds `seed`, `seed` + 1, ...
        examples: the texts.
        samples: S, draws of each.
        seed: of the draws.
    """
    coords = {"example": np.arange(len(examples))}
    feed = Feed(model, examples)
    *chains, prior = [
        _outcome(model, guide, feed, samples, seed + i) for i, guide in enumerate(guides)
    ]

    def each(values: Sequence[Tensor]) -> xr.Dataset:
        return dataset({"label": (_DIMS, torch.stack(list(values)).numpy())}, coords)

    def given(**values: Any) -> xr.Dataset:
        return xr.Dataset({name: ("example", value) for name, value in values.items()}, coords)

    groups = {
        "posterior_predictive": each([labels for labels, _ in chains]),
        "prior_predictive": each([prior[0]]),
        "constant_data": given(text=np.array(examples.texts, dtype=object)),
    }
    if examples.labels is not None:
        groups["log_likelihood"] = each([fit for _, fit in chains if fit is not None])
        groups["observed_data"] = given(label=examples.labels.numpy())
    return groups


def _outcome(
    model: Model, guide: Callable[..., Any], feed: Feed, samples: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """(S, N) labels, and log-likelihoods if the examples are labelled."""
    with seeded(seed):
        parts = [*passes(model, drawn(model, guide, samples, seed), feed, _take)]
    predicted, *fit = (torch.cat(part) for part in zip(*parts, strict=True))
    if model.likelihood.kind != "rating":
        predicted = predicted.long()
    return predicted, fit[0] if fit else None


def _take(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    sample = distribution.sample()
    return (sample,) if labels is None else (sample, distribution.log_prob(labels))


SMALL = 10_000
"""Variables with more numbers a draw than this are left out unless they are named."""

_FLOAT, _INTEGER = 4, 8  # bytes


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

    Groups: `posterior` and `prior`, one variable a site, dims (chain, draw, *site dims), and what a
    person can read of the weights: the change that each branch makes, LoRA's spectra and effective
    ranks, gates, the effect of the head's weights (`variables`); `sample_stats`, the last round's
    trace (dim `step`) and the KL of each site (nats, dim `site`); and with data
    `posterior_predictive`, `prior_predictive`, `constant_data` (the texts) and, if labelled,
    `observed_data` and `log_likelihood`, over the dim `example`. Draw s of a group belongs to draw
    s of the weights. A guide of several components has a chain for each (`chains`). Under a linear
    guide the prior, too, predicts with the linearised network; under several, with each one's for
    equally many draws, rounded up.

    Args:
        posterior: the posterior.
        data: as for `Posterior.predict`.
        samples: S, draws a chain.
        sites: patterns of variables' names, such as "lora.*" or "change.*"; by default all of at
            most `SMALL` numbers. Those left out are named in the attribute `left_out` of
            `posterior`.
        max_bytes: the most that the arrays may take.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: a pattern matches nothing, or the arrays would exceed `max_bytes`.

    >>> from bhpeft_pyro.posterior.fit import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> idata = to_arviz(fitted, tiny_examples(5), samples=10)
    >>> dict(idata.posterior["head.weight"].sizes)
    {'chain': 1, 'draw': 10, 'output': 2, 'feature': 16}
    >>> idata.posterior["spectrum.lora.query"].dims
    ('chain', 'draw', 'layer', 'rank')
    >>> idata.log_likelihood["label"].shape
    (1, 10, 5)
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    model = posterior.model
    examples = None
    if data is not None:
        examples = posterior.encode(data, labelled=False)
    guides = chains(posterior.guide)
    one = draw(model, guides[0], 1, seed)
    known = variables(posterior, {name: value[:, 0] for name, value in one.items()})
    numel = {name: variable.numel for name, variable in known.items()}
    chosen = _choose(numel, sites)
    needed = samples * (len(guides) + 1) * _FLOAT * sum(numel[name] for name in chosen)
    if examples is not None:
        needed += samples * len(examples) * _per_prediction(len(guides))
        if is_linear(posterior.guide):  # so many draws at once
            weights = sum(site.numel for site in model.network.sites)
            needed += min(samples * _FLOAT * weights, MAX_BYTES)
    if needed > max_bytes:
        raise ConfigError(
            f"sites, samples={samples}: {needed:,} bytes needed, but max_bytes={max_bytes:,}; take "
            f"fewer samples or name fewer sites (chosen: {', '.join(chosen)})"
        )
    every = [*guides, prior_like(model, posterior.guide)]
    *drawn, before = [
        chosen_draws(posterior, guide, chosen, samples, seed + i) for i, guide in enumerate(every)
    ]
    axes = Axes({name: known[name] for name in chosen}, posterior.columns.label_names)
    report = posterior.report
    attrs = {
        "left_out": ", ".join(name for name in numel if name not in chosen),
        "guide": type(posterior.guide).__name__,
        "round": len(posterior.lineage),
        "temperature": report.temperature,
        "examples": report.examples,
    }
    groups = {
        "posterior": axes.dataset(drawn, attrs),
        "prior": axes.dataset([before], {}),
        "sample_stats": trace(report),
    }
    if examples is not None:
        groups |= predictions(model, every, examples, samples, seed)
    return join(groups)


def _choose(numel: Mapping[str, int], sites: str | Sequence[str] | None) -> list[str]:
    if sites is None:
        return [name for name, count in numel.items() if count <= SMALL]
    patterns = [sites] if isinstance(sites, str) else list(sites)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in numel):
            raise ConfigError(f"sites: {pattern!r} matches no site; sites: {', '.join(numel)}")
    return [name for name in numel if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _per_prediction(guides: int) -> int:
    """Bytes for each draw and example."""
    # Labels of guides and prior, log-likelihoods; and both of the guide that is at work.
    return _INTEGER * (guides + 1) + _FLOAT * guides + 2 * _FLOAT
