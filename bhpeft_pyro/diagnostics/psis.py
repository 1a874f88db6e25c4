"""Pareto-smoothed importance sampling (PSIS): how far a guide is from the posterior."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyro
import torch
from pydantic import Field
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to

from ..base.isolation import alone
from ..base.progress import work
from ..base.values import Seed, Whole, checked_call, derived, valid
from ..errors import ConfigError, DataError, GuideError
from ..guides import Guide
from ..model.cached_batches import CachedBatches
from ..model.model import Model
from ..posterior.posterior import Posterior
from ..prediction.draws import PLATE, Draws, linearised_at, passes, traces
from ..priors import checked, complete

_FEWEST = 100  # draws; with fewer, no k-hat above 0.5 could be trusted
_Samples = Annotated[Whole, Field(ge=_FEWEST)]
_NOTHING = np.log(np.finfo(float).tiny)  # from here down the ratio to the largest is no number
_EQUAL = 1e-3  # ratios within 0.1 % of each other differ by rounding only, so there is no tail


@dataclass(frozen=True)
class PSIS:
    """The diagnosis of a guide q by importance ratios p(labels, w) / q(w) (Vehtari et al. 2024).

    Attributes:
        k_hat: shape of the generalised Pareto distribution fitted to the largest ratios, which
            have 1 / k_hat finite moments.
        effective_samples: 1 / (sum of squared normalised weights): the S weighted draws are worth
            this many independent draws of the posterior.
        log_evidence: log p(labels), in nats. At a temperature T other than 1 it is the logarithm
            of the integral of p(labels | w)^(1/T) p(w). NaN for a Laplace approximation, unless its
            temperature and tau are 1: its target has another prior than the model.
        standard_error: of `log_evidence`; meaningful if `k_hat` is not bad.
        samples: S.

    >>> normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> [PSIS.of(spread * normal).verdict for spread in (0.0, 0.1, 9.0)]
    ['good', 'good', 'bad']
    >>> print(PSIS(0.6, 250.0, -21.5, 0.05, 1000))
    PSIS k-hat 0.60: ok (within 0.67, the limit for 1000 draws); effective sample size 250.0; \
log evidence -21.50 ± 0.05
    """

    k_hat: float
    effective_samples: float
    log_evidence: float
    standard_error: float
    samples: int

    @classmethod
    def of(cls, log_ratios: Tensor) -> PSIS:
        """Smooth (S,) log importance ratios.

        Raises:
            ConfigError: fewer than 100 ratios, a NaN, or a largest one that is not finite.
        """
        if log_ratios.dim() != 1 or len(log_ratios) < _FEWEST:
            raise ConfigError(
                f"samples: expected {_FEWEST} or more log-ratios, got {tuple(log_ratios.shape)}"
            )
        if log_ratios.isnan().any() or not log_ratios.max().isfinite():
            raise ConfigError("log_ratios: some are not numbers, or none is finite")
        raw = log_ratios.detach().cpu().double().numpy()
        smooth, k_hat, samples = raw - np.logaddexp.reduce(raw), 0.0, len(raw)
        tail = math.ceil(min(samples / 5, 3 * samples**0.5))
        if np.sort(raw)[-tail - 1] < raw.max() + _NOTHING:  # nothing that it is the tail of
            k_hat = math.inf
        elif np.ptp(raw) >= _EQUAL:
            from ..integrations.arviz import psislw  # slow to import

            smooth, k_hat = psislw(raw)
        least = int(np.argmin(np.where(np.isfinite(raw), raw, np.inf)))  # never smoothed
        effective = float(1 / np.exp(2 * smooth).sum())
        return cls(
            k_hat=k_hat,
            effective_samples=effective,
            log_evidence=float(raw[least] - smooth[least]) - math.log(samples),
            standard_error=max(1 / effective - 1 / samples, 0.0) ** 0.5,
            samples=samples,
        )

    @property
    def threshold(self) -> float:
        """The largest k-hat at which S draws can be trusted, min(1 - 1 / log10(S), 0.7)."""
        return min(1 - 1 / math.log10(self.samples), 0.7)

    @property
    def verdict(self) -> str:
        """ "good" up to 0.5 (the ratios have a variance), "ok" up to `threshold`, else "bad"."""
        if self.k_hat > self.threshold:
            return "bad"
        return "good" if self.k_hat <= 0.5 else "ok"

    def __str__(self) -> str:
        side = "above" if self.verdict == "bad" else "within"
        line = (
            f"PSIS k-hat {self.k_hat:.2f}: {self.verdict} ({side} {self.threshold:.2f}, the limit "
            f"for {self.samples} draws); effective sample size {self.effective_samples:.1f}"
        )
        if self.verdict == "bad" or math.isnan(self.log_evidence):
            return line
        return f"{line}; log evidence {self.log_evidence:.2f} ± {self.standard_error:.2f}"


def psis(posterior: Posterior, data: object, samples: int = 1000, seed: int = 0) -> PSIS:
    """k-hat of a fitted guide of any kind, jointly over all its latents.

    Every draw is run on all the training data. A Laplace approximation is compared with the
    posterior of the linearised network that it approximates, under the prior chosen for its width
    (`Guide.target`). In a mixture each component is compared with its own posterior, and k-hat
    is that of all draws together.

    Args:
        posterior: the posterior; its model's prior is that of the last round.
        data: what the last round was fitted to.
        samples: S, at least 100.
        seed: of the draws.

    Raises:
        DataError: other data than the last round's.
        ConfigError: fewer than 100 samples, or a fit at temperature 0, which has no posterior.
        GuideError: the guide is a point estimate, or its density is not known.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> data = tiny_examples()
    >>> fitted = fit(tiny_model(()), "normal", data, max_steps=50, progress=False)
    >>> psis(fitted, data, samples=200).samples
    200
    """
    samples = valid(_Samples, "samples", samples)
    share = -(-samples // len(posterior.components))
    return _of_components(posterior, _by_component(posterior, data, share, seed))


@checked_call
def _by_component(posterior: Posterior, data: object, samples: int, seed: Seed) -> list[Tensor]:
    """For each component (S,) log importance ratios, as `log_ratios`."""
    last = posterior.report
    if last.temperature == 0 and not posterior.linear:
        raise ConfigError("temperature=0 is maximum likelihood: there is no posterior to compare")
    if not last.data:
        raise DataError(
            "data: it is not known what this posterior has learnt; expected one that was made with "
            "its data, as by Posterior.from_draws(model, draws, data)"
        )
    examples, _ = last.parted(posterior.encode(data))  # without those that it held out
    if examples.fingerprint != last.data:
        raise DataError(
            f"data: these {len(examples)} examples are not the {last.examples} that the last "
            "round was fitted to; expected all rows that were given, in their order"
        )
    batches = CachedBatches(posterior.model, examples)
    # Each component has its own prior after the first round, and its own linearised network.
    parts = posterior.components
    ratios = []
    with work("k-hat", len(parts)) as whole:
        for number, part in enumerate(parts):
            report = part.report
            model, guide, temperature = part.guide.target(
                part.model, report.temperature, later=report.parent is not None
            )
            ratios.append(
                log_ratios(model, guide, batches, samples, derived(seed, number), temperature)
            )
            whole.next()
    return ratios


def _of_components(posterior: Posterior, ratios: Sequence[Tensor]) -> PSIS:
    """The diagnosis by the log ratios of all components together."""
    result = PSIS.of(torch.cat([*ratios]))
    taus = {part.report.tau or 1.0 for part in posterior.components}
    if posterior.linear and (posterior.report.temperature != 1 or taus != {1.0}):
        return replace(result, log_evidence=math.nan, standard_error=math.nan)
    return result


@dataclass(frozen=True)
class Diagnosis:
    """How good a posterior is, as far as that is known without a reference.

    Attributes:
        psis: how near the guide is to the posterior, over all latents.
        warnings: of the last round's report.
        components: of a mixture, a diagnosis of each; the rest is of the mixture.

    >>> print(Diagnosis(PSIS(0.4, 250.0, -21.5, 0.05, 1000), ()))
    PSIS k-hat 0.40: good (within 0.67, the limit for 1000 draws); effective sample size 250.0; \
log evidence -21.50 ± 0.05
    no warnings
    """

    psis: PSIS
    warnings: tuple[str, ...]
    components: tuple[Diagnosis, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.psis), *(self.warnings or ["no warnings"])]
        for number, part in enumerate(self.components, 1):
            lines += [f"component {number}:", *(f"  {line}" for line in str(part).splitlines())]
        return "\n".join(lines)


def diagnose(posterior: Posterior, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
    """`psis` on the training data, and the report's warnings; for a mixture, of each component too.

    Args:
        posterior, data, seed: as for `psis`, whose errors it raises.
        samples: of each component, at least 100; the k-hat of a mixture is that of them all.
    """
    samples, parts = valid(_Samples, "samples", samples), posterior.components
    ratios = _by_component(posterior, data, samples, seed)

    def diagnosis(of: Posterior, by: Sequence[Tensor], *components: Diagnosis) -> Diagnosis:
        return Diagnosis(_of_components(of, by), tuple(of.report.warnings), components)

    each = [diagnosis(part, [mine]) for part, mine in zip(parts, ratios, strict=True)]
    return each[0] if len(parts) == 1 else diagnosis(posterior, ratios, *each)


def log_likelihoods(
    model: Model, draws: Iterable[Draws], batches: CachedBatches, samples: int | None = None
) -> Tensor:
    """(S,) float64: log p(labels | weights) of all examples together, under each of S draws."""

    def take(predicted: TorchDistribution, labels: Tensor | None) -> tuple[Tensor]:
        assert labels is not None
        return (predicted.log_prob(labels),)

    sums = []
    with work("likelihoods", samples) as whole:
        for (part,) in passes(model, draws, batches, take):
            sums.append(part.double().sum(-1))
            whole.next(parts=len(part))
    return torch.cat(sums)


def log_ratios(
    model: Model,
    guide: Guide,
    batches: CachedBatches,
    samples: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """(S,) float64: log p(labels | w) / T + log p(w) - log q(w) of S draws w of the guide; T is the
    temperature at which it was fitted.

    The likelihood is that of all examples; for a linear guide, that of the linearised network.
    A guide may sample auxiliary variables of which its latents are one-to-one functions, each
    given as a `Delta` with the log-Jacobian as its `log_density`, as Pyro's autoguides do.

    Raises:
        GuideError: latents and guide differ; the guide is a point in some of them; or it samples
            more or fewer numbers than the latents have, so that its density is not known.
    """
    at, densities = linearised_at(model, guide), []

    def draws() -> Iterator[Draws]:
        for trace in traces(guide, samples, torch.Generator().manual_seed(seed)):
            weights = _latents(trace)
            prior = _prior_trace(model, weights)
            _check(_sites(trace), _sites(prior))
            densities.append(_log_prob(prior, weights, temperature) - _log_prob(trace))
            yield Draws(complete(model.prior, model.sites, weights), at)

    likelihood = log_likelihoods(model, draws(), batches, samples)
    ratios = likelihood / temperature + torch.cat(densities)
    if ratios.isnan().any() or (ratios == math.inf).any():
        raise GuideError("guide: its log-density, or the model's, is not finite at its own draws")
    return ratios


def log_prior(model: Model, guide: Guide, samples: int, seed: int = 0) -> Tensor:
    """(S,) float64: the log-density of the model's prior at S draws of the guide."""
    densities = []
    for trace in traces(guide, samples, torch.Generator().manual_seed(seed)):
        prior = _prior_trace(model, _latents(trace))
        _check_covered(_sites(prior))
        densities.append(_log_prob(prior))
    return torch.cat(densities)


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    """(s, 1, *shape) of each latent in a guide's trace; a joint one is not split into sites."""
    return {
        name: node["value"].detach()
        for name, node in _sites(trace).items()
        if not (node["is_observed"] or node["infer"].get("is_auxiliary"))
    }


def _prior_trace(model: Model, latents: dict[str, Tensor]) -> poutine.Trace:
    """The statements of the prior at draws of its latents."""
    count = len(next(iter(latents.values())))
    with alone(), poutine.trace() as tracer, pyro.plate(PLATE, count, dim=-2):
        poutine.condition(checked, data=latents)(model.prior, model.sites)
    return tracer.trace


def _sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def _log_prob(
    trace: poutine.Trace, latents: Collection[str] | None = None, temperature: float = 1.0
) -> Tensor:
    """(s,) float64: the log-probability of each draw; what is not among the `latents`, such as a
    prior's factor, is tempered as labels are."""
    with torch.no_grad():
        trace.compute_log_prob(lambda _name, node: not site_is_subsample(node))
    total = torch.zeros((), dtype=torch.float64)
    for name, node in _sites(trace).items():
        # Dims but the draws' are those of plates in the guide or prior.
        log_prob = node["log_prob"].double().movedim(-2, 0).flatten(1).sum(1).cpu()
        total = total + log_prob / (1.0 if latents is None or name in latents else temperature)
    return total


def _check(guided: Mapping[str, dict[str, Any]], latent: Mapping[str, dict[str, Any]]) -> None:
    """Check that q(w) is a density over the model's latents, and that the trace gives it."""
    _check_covered(latent)
    names = {name for name, node in guided.items() if not node["infer"].get("is_auxiliary")}
    if unknown := names - latent.keys():
        raise GuideError(
            f"guide: the model has no {', '.join(sorted(unknown))}; mark auxiliary sites with "
            "infer={'is_auxiliary': True}"
        )
    # What a prior computes (`pyro.deterministic`) or adds (`pyro.factor`) is not a latent.
    wanted = sum(_dimensions(latent[name]) for name in names)
    given = sum(_dimensions(node) for node in guided.values() if not _is_point(node["fn"]))
    if given != wanted:
        points = ", ".join(name for name in names if _is_point(guided[name]["fn"])) or "none"
        raise GuideError(
            f"guide: it draws {given} random numbers for latents of {wanted} dimensions (fixed or "
            f"computed: {points}), so it has no density over them"
        )


def _check_covered(latent: Mapping[str, dict[str, Any]]) -> None:
    if missing := [name for name, node in latent.items() if not node["is_observed"]]:
        raise GuideError(f"guide: it does not sample {', '.join(missing)}")


def _dimensions(node: Mapping[str, Any]) -> int:
    """How many unconstrained numbers a site has, per draw."""
    fn = node["fn"]
    batch = math.prod(fn.batch_shape) // fn.batch_shape[-2]
    return batch * math.prod(biject_to(fn.support).inverse_shape(fn.event_shape))


def _is_point(fn: Any) -> bool:
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Delta)
