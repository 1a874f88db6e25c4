"""Drift: are new data as surprising as the posterior expects, before it learns them?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import Examples
from ..errors import ConfigError, GuideError, PriorError
from ..forecast import ClassForecast, RatingForecast
from ..guides import LaplaceGuide, MixtureGuide, prior_guide
from ..inference.draws import seeded
from ..inference.loop import as_module
from ..inference.predict import AnyForecast, predict
from ..model.model import Model
from ..posterior.posterior import MixturePosterior, Posterior
from .forgetting import Forgetting

__all__ = ["Advice", "Drift", "Signal", "assess", "check_samples"]

_LEVEL = 0.05  # of p-values

Advice = Literal["keep", "update", "forget", "start anew"]

# Below this share of the whole, what is still uncertain about the weights is not worth a round.
_KNOWN = 0.05
_HALF = 0.5  # how much is kept where forgetting is tried


@dataclass(frozen=True)
class Signal:
    """A statistic of the new labels against what the posterior expects of it.

    Attributes:
        observed: on the labels as they are.
        expected, sd: over labels simulated from the posterior.
        p: share of the simulated values (and the observed one) that are at least as large.
    """

    observed: float
    expected: float
    sd: float
    p: float

    @property
    def z(self) -> float:
        """How many sds above what was expected."""
        return (self.observed - self.expected) / self.sd if self.sd > 0 else 0.0


@dataclass(frozen=True)
class Drift:
    """What `assess` found, before anything was learnt.

    Attributes:
        examples: N.
        epistemic: mean epistemic uncertainty: mutual information in nats, or a variance (ratings).
        known: the share of the total uncertainty that is not epistemic.
        nll: minus the log evidence per example under the posterior (None without labels).
        error: share of wrong classes, or mean squared error (None without labels).
        alternatives: `nll` had half of what was learnt been forgotten, or all: under the
            priors with keep = 0.5 and 0; nan where there is no closed form. Empty if nothing was
            surprising.
        level: p-values up to it are surprising.
        forecast: the predictions, with the labels.

    The p-value is that of a prior predictive check (Box 1980), with the posterior in the prior's
    place. It is exact for labels that do come from the model: in a share `level` of the rounds
    without drift they are called surprising. Real data under an over-confident posterior are
    surprising more often, under an under-confident one less.
    """

    examples: int
    epistemic: float
    known: float
    nll: Signal | None
    error: Signal | None
    alternatives: Mapping[float, float]
    level: float
    forecast: AnyForecast

    @property
    def surprising(self) -> bool:
        """Whether the labels are less probable than the posterior expects."""
        return self.nll is not None and self.nll.p <= self.level

    @property
    def advice(self) -> Advice:
        """What to do with the data.

        "keep": no surprise, and hardly anything left to learn from data like these. "update": no
        surprise, or what is known still predicts the new data better than after forgetting.
        "forget" (`update(keep=0.5)`) or "start anew": surprise, and the first prior's mixture with
        the posterior, or the first prior by itself, predicts them better.
        """
        if not self.surprising:
            return "keep" if self.known > 1 - _KNOWN else "update"
        assert self.nll is not None
        options = {1.0: self.nll.observed, **self.alternatives}
        best = min(
            (keep for keep in options if not math.isnan(options[keep])), key=options.__getitem__
        )
        advice: dict[float, Advice] = {1.0: "update", _HALF: "forget", 0.0: "start anew"}
        return advice[best]

    def metrics(self) -> dict[str, float]:
        """The figures as plain numbers, for a record."""
        found = {"epistemic": self.epistemic, "known": self.known}
        for name in ("nll", "error"):
            signal: Signal | None = getattr(self, name)
            if signal is not None:
                found |= {
                    name: signal.observed,
                    f"{name}_expected": signal.expected,
                    f"{name}_z": signal.z,
                    f"{name}_p": signal.p,
                }
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.advice}: {self.examples} examples",
            f"  epistemic uncertainty {self.epistemic:.4f}, {1 - self.known:.1%} of the whole",
        ]
        for name in ("nll", "error"):
            signal: Signal | None = getattr(self, name)
            if signal is not None:
                lines.append(
                    f"  {name} {signal.observed:.4f}, expected {signal.expected:.4f} ± "
                    f"{signal.sd:.4f} (z {signal.z:+.1f}, p {signal.p:.3f})"
                )
        lines += [f"  nll with keep={keep:g}: {nll:.4f}" for keep, nll in self.alternatives.items()]
        return "\n".join(lines)


def assess(
    posterior: Posterior,
    data: object,
    samples: int = 64,
    *,
    level: float = _LEVEL,
    seed: int = 0,
    max_rows: int = 64,
) -> Drift:
    """Compare new data with what a posterior expects of data on the same texts.

    `samples` draws make the predictive distribution, and as many others simulate labels: each a
    whole set of them, from one draw of the weights, so labels hang together as they do under the
    model. The observed labels are ranked among the simulated ones by their mean NLL and by their
    error under the predictive. Nothing is learnt.

    Args:
        posterior: of any guide that is not a point.
        data: what `Posterior.predict` takes; without labels only `epistemic` and `known` are found.
        samples: p-values go down to 1 / (samples + 1).
        level: of the p-value, for the advice.
        seed: of draws and simulation.
        max_rows: as for `predict`.

    Raises:
        ConfigError: too few samples to tell p-values from `level`.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=9, progress=False)
    >>> drift = assess(posterior, tiny_examples(20, seed=1), samples=20)
    >>> drift.surprising, 0 < drift.nll.p <= 1
    (False, True)
    """
    check_samples(samples, level)
    examples = posterior.encode(data, labelled=False)
    options: dict[str, Any] = {"seed": 2 * seed, "max_rows": max_rows}
    forecast = posterior.predict(examples, samples, **options)
    nll = error = None
    alternatives: dict[float, float] = {}
    if examples.labels is not None:
        options |= {"seed": 2 * seed + 1, "keep_samples": True}
        simulated = _simulate(posterior.predict(examples, samples, **options), seed)
        nll, error = (
            _signal(statistic(forecast, examples.labels), statistic(forecast, simulated))
            for statistic in (_nll, _error)
        )
        if nll.p <= level:
            for keep in (_HALF, 0.0):
                alternatives[keep] = _under(posterior, keep, examples, samples, seed, max_rows)
    total = forecast.total.double().mean().item()
    epistemic = forecast.epistemic.double().mean().item()
    known = 1 - epistemic / total if total > 0 else 1.0
    return Drift(len(examples), epistemic, known, nll, error, alternatives, level, forecast)


def _simulate(forecast: AnyForecast, seed: int) -> Tensor:
    """(S, N): for each draw of the weights one set of labels."""
    with seeded(seed):
        if isinstance(forecast, RatingForecast):
            return torch.normal(forecast.means, forecast.sds)
        assert forecast.samples is not None
        return torch.distributions.Categorical(probs=forecast.samples).sample()


def _signal(observed: Tensor, simulated: Tensor) -> Signal:
    as_large = int((simulated >= observed).sum())
    return Signal(
        observed.item(),
        simulated.mean().item(),
        simulated.std().item(),
        (1 + as_large) / (1 + len(simulated)),
    )


def check_samples(samples: int, level: float = _LEVEL) -> None:
    """Whether so many draws can tell a p-value from the level.

    Raises:
        ConfigError: they cannot.
    """
    if not 1 / (samples + 1) <= level < 1:
        raise ConfigError(
            f"samples={samples}: p-values are multiples of 1/{samples + 1}; level={level} needs "
            f"{math.ceil(1 / level) - 1 if 0 < level < 1 else 'to be in (0, 1) and'} or more"
        )


def _nll(forecast: AnyForecast, labels: Tensor) -> Tensor:
    """(...) mean NLL of labels (..., N)."""
    if isinstance(forecast, ClassForecast):
        logs = forecast.log_probabilities.expand(*labels.shape, -1)
        return -logs.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1).mean(-1)
    rows = labels.reshape(-1, len(forecast))
    found = torch.stack([-forecast.log_prob(row).double().mean() for row in rows])
    return found.reshape(labels.shape[:-1])


def _error(forecast: AnyForecast, labels: Tensor) -> Tensor:
    """(...) mean error of labels (..., N)."""
    if isinstance(forecast, ClassForecast):
        return (forecast.label != labels).double().mean(-1)
    return (forecast.mean - labels).double().square().mean(-1)


def _under(
    posterior: Posterior, keep: float, examples: Examples, samples: int, seed: int, max_rows: int
) -> float:
    """The NLL had only a part of what was learnt been kept, of each component by itself."""
    parts = posterior.components if isinstance(posterior, MixturePosterior) else (posterior,)
    try:
        models, guides = zip(*(_forgetful(part, keep) for part in parts), strict=True)
    except (GuideError, PriorError):
        return math.nan
    guide = guides[0] if len(guides) == 1 else MixtureGuide([*map(as_module, guides)])
    forecast = predict(models[0], guide, examples, samples, seed=2 * seed, max_rows=max_rows)
    assert examples.labels is not None
    return _nll(forecast, examples.labels).item()


def _forgetful(posterior: Posterior, keep: float) -> tuple[Model, Callable[..., object]]:
    """The model under a prior that keeps so much, and this prior as it predicts: in the linearised
    network, if the posterior does.

    Raises:
        GuideError, PriorError: there is no closed form.
    """
    prior = posterior.first_prior
    if keep > 0:
        prior = Forgetting(keep)(posterior.as_prior(), prior, posterior.model.sites)
    if prior is None:
        raise PriorError("the first prior is not known")
    network, likelihood, guide = (
        posterior.model.network,
        posterior.model.likelihood,
        posterior.guide,
    )
    if not isinstance(guide, LaplaceGuide):
        model = Model(network, prior, likelihood)
        return model, prior_guide(model)
    start = LaplaceGuide(Model(network, prior, likelihood))  # refuses a prior that is not Normal
    model = Model(network, guide.for_predictions(start.own_prior()), likelihood)
    return model, prior_guide(model, lambda: start.unpack(start.prior.loc))
