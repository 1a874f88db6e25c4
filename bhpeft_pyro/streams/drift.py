"""Drift: are new data more surprising than the posterior expects, before it learns them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..base.isolation import seeded
from ..base.values import Seed, Whole, checked_call, derived, valid
from ..data import Examples
from ..model.cached_batches import CachedBatches
from ..posterior.posterior import Posterior
from ..prediction.draws import draw_parts, passes
from ..prediction.predict import AnyForecast, simulate

_LEVEL = 0.05  # p-values up to this are surprising
_Samples = Annotated[Whole, Field(ge=math.ceil(1 / _LEVEL) - 1)]


@dataclass(frozen=True)
class Signal:
    """The NLL of the new labels, and what the posterior expects of it.

    Attributes:
        observed: for the labels as they are.
        expected, sd: over labels simulated from the posterior.
        p: share of the simulated values (and the observed one) that are at least as large.
    """

    observed: float
    expected: float
    sd: float
    p: float

    @property
    def z(self) -> float:
        """How many sds the observed value lies above the expected one."""
        above = self.observed - self.expected
        if self.sd > 0:
            return above / self.sd
        return math.copysign(math.inf, above) if above else 0.0


@dataclass(frozen=True)
class Drift:
    """The result of `assess`, before anything was learnt.

    Attributes:
        examples: N.
        epistemic: mean epistemic uncertainty: mutual information in nats, or a variance (ratings).
        known: the share of the total uncertainty that is not epistemic.
        nll: mean negative log predictive density of the labels (None without labels).
        forecast: the predictions, with the labels.

    The p-value is that of a prior predictive check (Box 1980), with the posterior as the prior.
    For labels that do come from the model at most 5 % of the rounds without drift are called
    surprising. With real data, an over-confident posterior is surprised more often, an
    under-confident one less.
    """

    examples: int
    epistemic: float
    known: float
    nll: Signal | None
    forecast: AnyForecast

    @property
    def novel(self) -> float | None:
        """The share of the texts that are unlike what was learnt; about 5 % if none is (of texts
        like those, 5 % are false alarms); None if it is not known."""
        if self.forecast.novelty is None:
            return None
        return self.forecast.unlike().double().mean().item()

    @property
    def surprising(self) -> bool:
        """Whether the labels are less probable than the posterior expects (p up to 0.05)."""
        return self.nll is not None and self.nll.p <= _LEVEL

    def metrics(self) -> dict[str, float]:
        """The figures as plain numbers, for a record."""
        figures = {"epistemic": self.epistemic, "known": self.known}
        figures |= {} if self.novel is None else {"novel": self.novel}
        if (nll := self.nll) is not None:
            figures |= {"nll": nll.observed, "nll_expected": nll.expected}
            figures |= {"nll_z": nll.z, "nll_p": nll.p}
        return figures

    def __str__(self) -> str:
        lines = [
            f"{self.examples} examples",
            f"  epistemic uncertainty {self.epistemic:.4f}, {1 - self.known:.1%} of the total",
        ]
        if self.novel is not None:
            lines.append(f"  {self.novel:.1%} of the texts unlike what was learnt (5% by chance)")
        if (nll := self.nll) is not None:
            lines.append(
                f"  nll {nll.observed:.4f}, expected {nll.expected:.4f} ± {nll.sd:.4f} "
                f"(z {nll.z:+.1f}, p {nll.p:.3f}){': surprising' * self.surprising}"
            )
        return "\n".join(lines)


@checked_call
def assess(posterior: Posterior, data: object, samples: int = 64, *, seed: Seed = 0) -> Drift:
    """Compare new data with what a posterior expects of data on the same texts.

    `samples` sets of labels are simulated, each from one draw of the weights, so that its labels
    are correlated as they are under the model. The observed labels are ranked among them by their
    mean NLL under the predictive distribution, that of `predict`. Nothing is learnt.

    Args:
        posterior: of any guide; a point estimate has no epistemic uncertainty.
        data: what `Posterior.predict` takes; without labels only `epistemic`, `known` and
            `novel` are computed.
        samples: simulated sets, at least 19; p-values go down to 1 / (samples + 1).
        seed: of draws and simulation.

    Raises:
        ConfigError: too few samples for a p-value of 0.05.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=9, progress=False)
    >>> drift = assess(posterior, tiny_examples(20, seed=1), samples=20)
    >>> drift.surprising, 0 < drift.nll.p <= 1
    (False, True)
    """
    samples = valid(_Samples, "samples", samples)
    posterior = posterior.replace(student=None)  # which has no draws to compare with
    examples = posterior.encode(data, labelled=False)
    forecast = posterior.predict(examples, seed=derived(2 * seed))
    nll = None
    if examples.labels is not None:
        others = draw_parts(posterior.model, posterior.guides, samples, 2 * seed + 1)
        with seeded(seed):
            labels, *_ = simulate(posterior.model, others, CachedBatches(posterior.model, examples))
        sets = torch.cat([examples.labels.unsqueeze(0), labels])
        if getattr(forecast, "outcomes", None) is not None:
            scores = _mixture_nll(posterior, examples, sets, samples, 2 * seed)
        else:
            scores = torch.stack([forecast.nlls(labels).mean() for labels in sets])
        observed, expected = scores[0], scores[1:]
        as_large = int((expected >= observed).sum())
        nll = Signal(
            observed.item(),
            expected.mean().item(),
            expected.std().item(),
            p=(1 + as_large) / (1 + len(expected)),
        )
    total = forecast.total.double().mean().item()
    epistemic = forecast.epistemic.double().mean().item()
    known = 1 - epistemic / total if total > 0 else 1.0
    return Drift(len(examples), epistemic, known, nll, forecast)


def _mixture_nll(
    posterior: Posterior, examples: Examples, labels: Tensor, samples: int, seed: int
) -> Tensor:
    """(M,) mean NLL of sets of labels (M, N) under a likelihood of which no forecast has the form.

    The predictive distribution is the mixture over the draws of the weights.
    """
    feed = CachedBatches(posterior.model, replace(examples, labels=labels.T))

    def take(predicted: TorchDistribution, sets: Tensor | None) -> Sequence[Tensor]:
        assert sets is not None  # (B, M)
        return (predicted.log_prob(sets.T.unsqueeze(1)).movedim(0, -1),)

    draws = draw_parts(posterior.model, posterior.guides, samples, seed)
    parts = [part.double() for (part,) in passes(posterior.model, draws, feed, take)]
    logs = torch.stack([part.logsumexp(0) for part in parts]).logsumexp(0)
    return (math.log(sum(map(len, parts))) - logs).mean(0)
