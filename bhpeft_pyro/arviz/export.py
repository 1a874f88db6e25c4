"""`to_arviz`: which draws are exported, and that they fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..guides import prior_like
from ..guides.guide import is_linear
from ..inference.draws import draw
from ..linear import MAX_BYTES
from .axes import Axes
from .container import join
from .draws import chains, chosen_draws
from .predictions import predictions
from .trace import trace
from .variables import variables

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["SMALL", "to_arviz"]

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

    >>> from bhpeft_pyro.fitting import fit
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
        examples = posterior.text.encode(model, data, labelled=False)
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
    axes = Axes({name: known[name] for name in chosen}, posterior.text.label_names)
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
