"""Pareto-smoothed importance sampling (PSIS): how far a guide is from the posterior."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..base.checks import SEED, Number, derived
from ..base.progress import work
from ..data import Examples
from ..errors import ConfigError, DataError
from ..model.cached_batches import CachedBatches
from ..posterior.mixture import MixturePosterior
from ..posterior.posterior import Posterior
from .ratios import log_ratios

with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

_FEWEST = 100  # draws; with fewer, no k-hat above 0.5 could be trusted
_EQUAL = 1e-3  # ratios within 0.1 % of each other differ by rounding only, so there is no tail


@dataclass(frozen=True)
class PSIS:
    """What importance ratios p(labels, w) / q(w) say of a guide q (Vehtari et al. 2024).

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
        smooth, k_hat = _smooth(raw)
        least = int(np.argmin(np.where(np.isfinite(raw), raw, np.inf)))  # never smoothed
        samples = len(raw)
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
    (`Strategy.target`). (After replay this is approximate if the round and its coreset had
    other temperatures.) In a mixture each component is compared with its own
    posterior, and k-hat is that of all draws together.

    Args:
        posterior: the posterior; its model's prior is that of the last round.
        data: what the last round was fitted to; with replay, `Examples` of its own data and of
            those kept by the round before: `encode(...).concat(before.coreset.examples)`.
        samples: S, at least 100.
        seed: of the draws.

    Raises:
        DataError: other data than the last round's; or components that learnt different rows.
        ConfigError: fewer than 100 samples, or a fit at temperature 0, which has no posterior.
        GuideError: the guide is a point estimate, or its density is not known.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> data = tiny_examples()
    >>> fitted = fit(tiny_model(()), "normal", data, max_steps=50, progress=False)
    >>> psis(fitted, data, samples=200).samples
    200
    """
    samples = Number(least=_FEWEST, whole=True)("samples", samples)
    seed = SEED("seed", seed)
    if posterior.report.temperature == 0 and not posterior.guide.linear:
        raise ConfigError("temperature=0 is maximum likelihood: there is no posterior to compare")
    feed = CachedBatches(posterior.model, _training_examples(posterior, data))
    # Each component has its own prior after the first round, and its own linearised network.
    parts = posterior.components
    share = -(-samples // len(parts))
    ratios = []
    with work("k-hat", len(parts)) as whole:
        for number, each in enumerate(parts):
            own = each.report
            model, guide, temperature = each.guide.strategy.target(
                each.model, own.temperature, later=own.parent is not None
            )
            ratios.append(log_ratios(model, guide, feed, share, derived(seed, number), temperature))
            whole.next()
    found, report = PSIS.of(torch.cat(ratios)), posterior.report
    taus = {each.report.tau or 1.0 for each in parts}
    if posterior.guide.linear and (report.temperature != 1 or taus != {1.0}):
        return replace(found, log_evidence=math.nan, standard_error=math.nan)
    return found


@dataclass(frozen=True)
class Diagnosis:
    """How good a posterior is, as far as that is known without a reference.

    Attributes:
        psis: how near the guide is to the posterior, over all latents.
        guards: warnings of the last round's report.
        components: of a `MixturePosterior`, a diagnosis of each; the rest is of the mixture.

    >>> print(Diagnosis(PSIS(0.4, 250.0, -21.5, 0.05, 1000), ()))
    PSIS k-hat 0.40: good (within 0.67, the limit for 1000 draws); effective sample size 250.0; \
log evidence -21.50 ± 0.05
    no warnings
    """

    psis: PSIS
    guards: tuple[str, ...]
    components: tuple[Diagnosis, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.psis), *(self.guards or ["no warnings"])]
        for number, each in enumerate(self.components, 1):
            lines += [f"component {number}:", *(f"  {line}" for line in str(each).splitlines())]
        return "\n".join(lines)


def diagnose(posterior: Posterior, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
    """`psis` on the training data, and the report's guards; for a mixture, of each component too.

    Args:
        posterior, data, samples, seed: as for `psis`, whose errors it raises.
    """
    data = posterior.encode(data)  # once for all components
    components = posterior.components if isinstance(posterior, MixturePosterior) else ()
    return Diagnosis(
        psis=psis(posterior, data, samples, seed),
        guards=tuple(posterior.report.guards),
        components=tuple(diagnose(each, data, samples, seed) for each in components),
    )


def _training_examples(posterior: Posterior, data: object) -> Examples:
    """The examples that the last round was fitted to, without those that it held out."""
    report = posterior.report
    if not report.data:
        raise DataError(
            "data: it is not known what this posterior has learnt; expected one that was made with "
            "its data, as by Posterior.from_draws(model, draws, data)"
        )
    if len({each.report.learnt for each in posterior.components}) > 1:
        raise DataError(
            "data: by replay the components of this mixture have learnt different rows; expected "
            "one of posterior.components, with the rows that it has learnt"
        )
    examples, _ = report.parted(posterior.encode(data))
    if examples.fingerprint != (report.learnt or report.data):
        replayed = ", with those that the round before had kept" if report.learnt else ""
        raise DataError(
            f"data: these {len(examples)} examples are not the {report.examples} that the last "
            f"round was fitted to{replayed}"
        )
    return examples


def _smooth(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Normalised smoothed log-weights and k-hat, from ArviZ 0.x or 1.x."""
    if np.ptp(log_ratios) < _EQUAL:
        return log_ratios - np.logaddexp.reduce(log_ratios), 0.0
    if hasattr(arviz, "psislw"):
        smooth, k_hat = arviz.psislw(log_ratios)
    else:
        from arviz_stats.base import array_stats

        smooth, k_hat = array_stats.psislw(-log_ratios)  # it takes log-likelihoods
    return smooth, float(k_hat)
