"""Does a promise still hold? It is watched as labels come in.

Let x of n answered texts be wrong, and a be the promised error. The e-value is the mean
likelihood ratio of errors p > a against a, with p uniform in (a, 1):

    E = 1/(1 - a) int_a^1 p^x (1 - p)^(n - x) dp / (a^x (1 - a)^(n - x))

As long as each answer is wrong with probability a at most, whatever came before, E is a test
supermartingale: it ever exceeds 1/d with probability at most d (Ville's inequality; Ramdas et al.
2023, "Game-theoretic statistics and safe anytime-valid inference"). So it may be looked at after
each text. It depends on two counts alone. At a true error of 15% against 5% it exceeds 20, where
`Watch` gives an alarm, after some 50 labelled answers. MAPIE's `RiskMonitoring`, whose bound is for
any bounded loss, takes 250 to 550.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln
from scipy.stats import beta

from ..base.values import Inside, valid
from ..errors import ConfigError, SaveError
from ..forecast.base import Forecast, way_in_words
from .promises import Promise, in_percent

if TYPE_CHECKING:
    from ..training.report import FitReport

__all__ = ["LEVEL", "Watch", "error_evidence", "in_words", "largest_evidence", "watched"]

LEVEL = 0.05
"""The largest probability of a false alarm, ever."""

_BROKEN = "promise/broken"
_MOST = 2**53  # beyond which float64 no longer counts


@dataclass
class Watch:
    """Watches a promise: tells it forecasts as soon as there are labels.

    Attributes:
        promise: that of a posterior.
        level: the largest probability of a false alarm, however long it watches.
        answered, wrong: how many answered texts with labels it has seen, and how many of the
            answers were wrong.
        evidence: the largest e-value so far that more are wrong than was promised; 1 is none.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(40), max_steps=9, progress=False)
    >>> posterior = posterior.promise(tiny_examples(200, seed=1), error=0.2)
    >>> watch = Watch(posterior.promised)
    >>> watch.see(posterior.predict(tiny_examples(100, seed=2))).holds
    True
    """

    promise: Promise
    level: float = LEVEL
    answered: int = field(default=0, init=False)
    wrong: int = field(default=0, init=False)
    evidence: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        self.level = valid(Inside, "level", self.level)

    def see(self, forecast: Forecast) -> Self:
        """Take the labels of more texts into account.

        Args:
            forecast: of texts with labels, in the order in which they came, by the posterior of the
                promise. Give a text once.

        Raises:
            ConfigError: it is not under this promise.
            DataError: it has no labels.
        """
        if str(forecast.promised) != str(self.promise):
            raise ConfigError(
                "forecast: it is not under the promise that is watched; expected one of the "
                f"posterior of round {self.promise.round}, of {way_in_words(self.promise.method)}"
            )
        return self.count(self.promise.mistakes(forecast))

    def count(self, wrong: Sequence[bool]) -> Self:
        """Take the labels of answered texts into account, one after the other: whether each answer
        is wrong; what `see` reads from a forecast."""
        evidence = largest_evidence(wrong, self.promise.error, self.answered, self.wrong)
        self.evidence = max(evidence, self.evidence)
        self.answered += len(wrong)
        self.wrong += sum(wrong)
        return self

    @property
    def holds(self) -> bool:
        """Whether the labels do not speak against the promise."""
        return self.evidence < 1 / self.level

    def __str__(self) -> str:
        lines = [
            f"at most {in_percent(self.promise.error)} wrong, promised in round "
            f"{self.promise.round}: {'holds so far' if self.holds else 'no longer holds'}"
        ]
        if self.answered:
            lines.append(
                f"{self.wrong} of {self.answered} answers with labels are wrong "
                f"({in_percent(self.wrong / self.answered)})"
            )
        if not self.holds:
            lines.append("posterior.promise with new calibration rows makes another")
        return "\n".join(lines)


def error_evidence(answered: int, wrong: int, error: float) -> float:
    """The e-value that more than a share `error` of answers are wrong; see the module.

    >>> round(error_evidence(100, 5, 0.05), 2), round(error_evidence(100, 15, 0.05))
    (0.04, 105)
    """
    return float(_evidence(np.array(answered), np.array(wrong), error))


def largest_evidence(
    wrong: Sequence[bool], error: float, answered: int = 0, before: int = 0
) -> float:
    """The largest `error_evidence` while answers come of which each is wrong or not, after so many
    `answered`, of which so many were wrong `before`; 1 at least."""
    counts = answered + np.arange(1, len(wrong) + 1)
    evidence = _evidence(counts, before + np.cumsum(np.array(wrong, dtype=int)), error)
    return float(evidence.max(initial=1.0))


def _evidence(answered: NDArray[Any], wrong: NDArray[Any], error: float) -> NDArray[Any]:
    if error >= 1:  # which nothing exceeds
        return np.ones(answered.shape)
    right = answered - wrong
    log = betaln(wrong + 1, right + 1) + beta.logsf(error, wrong + 1, right + 1)
    log -= math.log1p(-error) + wrong * math.log(error) + right * math.log1p(-error)
    evidence: NDArray[Any] = np.exp(np.minimum(log, 700.0))
    return evidence


def watched(forecast: Forecast, lineage: Sequence[FitReport]) -> dict[str, float]:
    """What the report of a round says of the promise of the round before it, from its forecast of
    the round's data before they were learnt.

    `promise/answered` and `promise/wrong` count these data; `promise/evidence` is `error_evidence`
    of them and of the rounds before, as far as they promised the same error, and since the last
    alarm; `promise/broken` is 1 if that is an alarm.

    Raises:
        SaveError: a report that tells of a promise lacks a count, or has one that is none.
    """
    promised = forecast.promised
    if promised is None or forecast.labels is None:
        return {}
    mistakes = promised.mistakes(forecast)
    counts = [len(mistakes), sum(mistakes)]
    noted = {"promise/answered": float(counts[0]), "promise/wrong": float(counts[1])}
    for report in reversed(lineage):
        before = report.metrics
        if "promise/error" not in before:  # a round with new labels
            continue
        told = {name: before.get(name, -1.0) for name in (*noted, _BROKEN)}
        if any(not 0 <= value <= _MOST for value in told.values()):
            raise SaveError(f"the report of round {report.id}: its counts of answers are damaged")
        if before["promise/error"] != promised.error or told[_BROKEN]:
            break
        counts = [n + int(told[k]) for n, k in zip(counts, noted, strict=True)]
    evidence = error_evidence(counts[0], counts[1], promised.error)
    broken = float(evidence >= 1 / LEVEL)
    noted |= {"promise/error": promised.error, "promise/evidence": evidence}
    return noted | {_BROKEN: broken}


def in_words(metrics: Mapping[str, float]) -> str | None:
    """What a report's metrics, those of `watched`, say of the promise; None if nothing.

    >>> in_words({"promise/answered": 40.0, "promise/wrong": 9.0, "promise/broken": 1.0})
    'no longer holds, 9 of 40 wrong'
    """
    if "promise/broken" not in metrics:
        return None
    counts = f"{metrics['promise/wrong']:.0f} of {metrics['promise/answered']:.0f} wrong"
    return f"{'no longer holds' if metrics['promise/broken'] else 'holds'}, {counts}"
