"""Does a promise still hold? It is watched as labels come in, and as texts do.

**Labels.** Let x of n answered texts be wrong, and a be the promised error. The e-value is the mean
likelihood ratio of errors p > a against a, with p uniform in (a, 1):

    E = 1/(1 - a) int_a^1 p^x (1 - p)^(n - x) dp / (a^x (1 - a)^(n - x))

As long as each answer is wrong with probability a at most, whatever came before, E is a test
supermartingale: it ever exceeds 1/d with probability at most d (Ville's inequality; Ramdas et al.
2023, "Game-theoretic statistics and safe anytime-valid inference"). So it may be looked at after
each text. It depends on two counts alone. At a true error of 15% against 5% it exceeds 20 after
some 50 labelled answers, and 40, where `Watch` gives an alarm, after some 70. MAPIE's
`RiskMonitoring`, whose bound is for any bounded loss, takes 250 to 550.

**Texts without labels.** How certain the forecast is of a text, and how unlike what was learnt it
is, are ranked among those of the calibration rows and of the texts before it. These p-values are
uniform and independent as long as all come from one source. A conformal test martingale (Vovk et
al. 2005, the simple jumper) bets that they are not.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
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

_BETS = np.array([-1, -0.5, 0, 0.5, 1])  # that p-values are small, or large, or neither
_JUMPS = 0.01  # of the stakes, from one bet to all
_BROKEN = "promise/broken"
_MOST = 1e100  # evidence, long after the alarm, so that it stays finite
_MOST_TEXTS = 2**53  # beyond which float64 no longer counts


@dataclass
class Watch:
    """Watches a promise: tells it forecasts, with labels as soon as there are any.

    Attributes:
        promise: that of a posterior.
        level: the largest probability of a false alarm, however long it watches; half of it is for
            labels and half for texts.
        answered, wrong: how many answered texts with labels it has seen, and how many of the
            answers were wrong.
        texts: how many texts it has seen.

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
    answered: int = 0
    wrong: int = 0
    texts: int = 0
    _largest: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _of_texts: dict[str, _Martingale] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.level = valid(Inside, "level", self.level)

    def see(self, forecast: Forecast) -> Self:
        """Take more texts into account.

        Args:
            forecast: of texts in the order in which they came, by the posterior of the promise. If
                it has labels, they count: give a text once, with its label or without.

        Raises:
            ConfigError: it is not under this promise.
        """
        if str(forecast.promised) != str(self.promise):
            raise ConfigError(
                "forecast: it is not under the promise that is watched; expected one of the "
                f"posterior of round {self.promise.round}, of {way_in_words(self.promise.method)}"
            )
        if forecast.labels is not None:
            self.count(*self.promise.counts(forecast))
        seen = {"chance": forecast.chance_right(self.promise.tolerance).tolist()}
        if forecast.novelty is not None:
            seen["novelty"] = forecast.novelty.tolist()
        return self.compare(seen)

    def count(self, answered: int, wrong: int) -> Self:
        """Take labels into account, of so many answered texts, so many of them wrongly; what `see`
        does if the labels come with the forecast."""
        self.answered += answered
        self.wrong += wrong
        evidence = error_evidence(self.answered, self.wrong, self.promise.error)
        self._largest["labels"] = max(evidence, self.evidence("labels"))
        return self

    def count_each(self, wrong: Sequence[bool]) -> Self:
        """Take labels of answered texts into account one after the other: whether each answer is
        wrong. What they say does not depend on how many come at once."""
        evidence = largest_evidence(wrong, self.promise.error, self.answered, self.wrong)
        self._largest["labels"] = max(evidence, self.evidence("labels"))
        self.answered += len(wrong)
        self.wrong += sum(wrong)
        return self

    def compare(self, values: Mapping[str, Sequence[float]]) -> Self:
        """Take texts into account by the "chance" of being right and the "novelty" of each; what
        `see` reads from their forecast."""
        for name in self.promise.calibration.keys() & values.keys():
            if name not in self._of_texts:
                self._of_texts[name] = _Martingale(self.promise.calibration[name].tolist())
            self._largest[name] = max(self._of_texts[name].see(values[name]), self.evidence(name))
        self.texts += len(values["chance"])
        return self

    def evidence(self, of: str) -> float:
        """The largest e-value so far that "labels" are wrong too often, or that the "chance" of
        being right or the "novelty" of texts is not as it was; 1 or less is none."""
        return self._largest.get(of, 1.0)

    @property
    def errors_exceed(self) -> bool:
        """Whether more answers are wrong than was promised."""
        return self.evidence("labels") >= 2 / self.level

    @property
    def texts_differ(self) -> bool:
        """Whether texts are no longer like the calibration rows."""
        of_texts = max(len(self._of_texts), 1)
        return any(self.evidence(name) >= 2 * of_texts / self.level for name in self._of_texts)

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against the promise."""
        return not (self.errors_exceed or self.texts_differ)

    def __str__(self) -> str:
        lines = [
            f"at most {in_percent(self.promise.error)} wrong, promised in round "
            f"{self.promise.round}: {'holds so far' if self.holds else 'no longer holds'}"
        ]
        if self.answered:
            lines.append(
                f"{self.wrong} of {self.answered} answers with labels are wrong "
                f"({in_percent(self.wrong / self.answered)})"
                + ", more than was promised"
                * self.errors_exceed
            )
        like = "not like" if self.texts_differ else "like"
        lines.append(f"{self.texts} texts, {like} the calibration rows")
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
    counts = [*promised.counts(forecast)]
    noted = {"promise/answered": float(counts[0]), "promise/wrong": float(counts[1])}
    for report in reversed(lineage):
        before = report.metrics
        if "promise/error" not in before:  # a round with new labels
            continue
        told = {name: before.get(name, -1.0) for name in (*noted, _BROKEN)}
        if any(not 0 <= value <= _MOST_TEXTS for value in told.values()):
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


class _Martingale:
    """The simple jumper, betting on p-values of values among those before them.

    Args:
        calibration: the values that come before all others.
    """

    def __init__(self, calibration: Sequence[float]) -> None:
        self._before = sorted(calibration)
        self._random = np.random.default_rng(0)
        self._stakes = np.full(len(_BETS), 1 / len(_BETS))

    def see(self, values: Sequence[float]) -> float:
        """The largest sum of the stakes while these values come."""
        largest = 0.0
        for value in values:
            below, up_to = bisect_left(self._before, value), bisect_right(self._before, value)
            rank = below + self._random.random() * (1 + up_to - below)
            p = rank / (len(self._before) + 1)
            self._before.insert(up_to, value)
            stakes = self._stakes * (1 + _BETS * (p - 0.5))
            total = min(float(stakes.sum()), _MOST)
            self._stakes = (1 - _JUMPS) * stakes.clip(max=_MOST) + _JUMPS * total / len(_BETS)
            largest = max(largest, total)
        return largest
