"""`to_arviz`: which draws are exported, and that they fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ..errors import ConfigError
from ..inference.draws import blocks, seeded
from .axes import Axes
from .container import join
from .predictions import predictions
from .readable import branches, with_changes
from .trace import trace

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["SMALL", "to_arviz"]

SMALL = 10_000
"""Sites with more weights than this are left out unless they are named."""

_FLOAT = 4  # bytes
_PREDICTED = 12  # bytes for each draw and example: a label and a log-likelihood


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
    changed = branches(posterior, one)
    numel |= {branch.name: branch.shape[0] for branch in changed}
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
        drawn = with_changes(posterior, {name: value[:, 0] for name, value in block.items()})
        for name in chosen:
            values[name].append(drawn[name].cpu())
    known = (*posterior.model.sites, *changed)
    axes = Axes([site for site in known if site.name in chosen], posterior)
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
        "sample_stats": trace(report.history, report.kl),
    }
    if examples is not None:
        groups |= predictions(posterior, examples, samples, seed)
    return join(groups)


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
            nodes = poutine.trace(model.prior).get_trace(model.sites).nodes
            names = {*chosen, *(site.name for site in model.sites)} & nodes.keys()
            drawn: dict[str, Tensor] = {}
            for name in names:
                value = nodes[name]["value"]
                assert isinstance(value, Tensor)
                drawn[name] = value[None]
            drawn = with_changes(posterior, drawn)
            for name in chosen:
                found[name].append(drawn[name][0].cpu())
    return {name: torch.stack(values) for name, values in found.items()}
