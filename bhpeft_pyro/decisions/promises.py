"""A promised error: which texts are answered, so that few of the answers are wrong.

Texts are ordered by the probability that their answer is right, `Forecast.chance_right`. Only those
above a threshold are answered. It is set on labelled calibration rows (`decisions.thresholds`) that
nothing was learnt from or chosen by. Far from what was learnt that probability means little, so
texts unlike it (`Forecast.unlike`) are left to people, among the calibration rows too: what is
promised is then true of what is answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..base.checks import warn
from ..base.names import Method
from ..base.values import (
    Amount,
    Count,
    Finite,
    Flag,
    Inside,
    PartialShare,
    Positive,
    SomeShare,
    checked_call,
    checked_dataclass,
)
from ..data import Examples
from ..data.copies import BY_CHANCE, among
from ..errors import ConfigError, DataError
from ..forecast.base import Forecast, way_in_words
from .thresholds import ALL, by_error, by_share, rows_needed

if TYPE_CHECKING:
    from ..model.model import Model
    from ..posterior.predictor import Predictor

__all__ = ["Promise", "check_rows", "terms", "with_promise"]

P = TypeVar("P", bound="Predictor")

_ANSWERS = {  # by the kind of labels, when an answer is wrong, and what texts are ordered by
    "class": ("the predicted class is not the label", "the probability of the predicted class"),
    "choice": (
        "the predicted choice is not the right one",
        "the probability of the predicted choice",
    ),
    "labels": (
        "any label is missing or too many",
        "the probability that all predicted labels are right",
    ),
    "rating": (
        "the prediction is more than {tolerance:g} from the rating",
        "the probability that the rating is at most {tolerance:g} from the prediction",
    ),
}

_CALIBRATION = {  # by the kind of labels, what is kept of the calibration rows
    "class": ("miss", "label"),
    "choice": ("miss", "label"),
    "labels": (),
    "rating": ("residual", "sd"),
}


@checked_dataclass(eq=False, kw_only=True)
class Promise:
    """A promise: of the answered texts, at most a share `error` is answered wrongly.

    Attributes:
        kind: of labels: "class", "choice", "labels" or "rating".
        error: the share of wrong answers that is not exceeded.
        confidence: of such promises, the share that is kept, over random calibration rows.
        tolerance: for ratings, the distance from the rating up to which an answer is right.
        to_people: the share of texts without an answer that is not exceeded either; None if it was
            not asked for.
        threshold: texts with a `Forecast.chance_right` above it are answered; None answers none.
        answer_unlike: whether texts unlike what was learnt are answered too.
        rows: N, how many calibration rows it was set on.
        unlike: how many of these are left to people since they are unlike what was learnt.
        answered, wrong: how many of these are answered, and how many of those wrongly.
        method: how forecasts have to be made, as `Forecast.method` says.
        round: id of the round whose forecasts it is for.
        calibration: (N,) tensors of the calibration rows: "chance", their `Forecast.chance_right`;
            of classes and choices "miss", one minus the probability of the label, and "label"; of
            ratings "residual" and "sd".

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(40), max_steps=9, progress=False)
    >>> posterior = posterior.promise(tiny_examples(200, seed=1), error=0.2)
    >>> posterior.promised.rows
    200
    >>> posterior.predict(["w5 w20", "w30"]).answered.shape
    torch.Size([2])
    """

    kind: str
    error: SomeShare
    confidence: Inside
    tolerance: Positive | None = None
    to_people: PartialShare | None = None
    threshold: Finite | None = None
    answer_unlike: Flag
    unlike: Amount
    rows: Count
    answered: Amount
    wrong: Amount
    method: str
    round: str
    calibration: Mapping[str, Tensor]

    @property
    def share(self) -> float:
        """The share of the calibration rows that is answered."""
        return self.answered / self.rows

    @property
    def in_short(self) -> str:
        """What is promised, in one line."""
        return (
            f"at most {in_percent(self.error)} of answers are wrong (confidence "
            f"{in_percent(self.confidence)}, {way_in_words(self.method)}); "
            f"{in_percent(self.share)} of {self.rows} calibration rows are answered"
        )

    def answers(self, forecast: Forecast) -> Tensor:
        """(N,) bool, which texts are answered."""
        if self.threshold is None:
            return torch.zeros(len(forecast), dtype=torch.bool)
        sure = forecast.chance_right(self.tolerance) > self.threshold
        return sure if self.answer_unlike else sure & ~forecast.unlike()

    def mistakes(self, forecast: Forecast) -> list[bool]:
        """Whether each answer is wrong, of the answered texts of a forecast with labels."""
        wrong: list[bool] = forecast.wrong(self.tolerance)[self.answers(forecast)].tolist()
        return wrong

    def on(self, forecast: Any, round: str) -> Any:
        """The forecast with this promise, if it was made in the way that the promise is for, and
        says which texts are unlike what was learnt, if the promise asks.

        Raises:
            ConfigError: it is a forecast of another round.
        """
        if self.round != round:
            raise ConfigError(
                f"promised: it is of round {self.round}, this is round {round}; "
                "posterior.promise(calibration) makes another"
            )
        told = self.answer_unlike or forecast.novelty is not None
        like = told and forecast.method == self.method
        return replace(forecast, promised=self) if like else forecast

    def __repr__(self) -> str:
        return f"Promise({self.in_short})"

    def __str__(self) -> str:
        wrong, value = (text.format(tolerance=self.tolerance) for text in _ANSWERS[self.kind])
        lines = [
            f"promise: of the texts that are answered, at most {in_percent(self.error)} are wrong"
        ]
        if self.to_people is not None:
            lines[0] += (
                f", and at most {in_percent(self.to_people)} of all texts are left to people"
            )
        lines += [
            f"an answer is wrong if {wrong}",
            f"confidence {in_percent(self.confidence)}: of promises made in this way from random "
            "calibration rows, this share is kept",
            f"it holds for texts like the {self.rows} calibration rows: of the same source, drawn "
            "in the same way. Nothing is promised of others, nor of a selection of these",
        ]
        if self.threshold is None:
            lines.append(
                "answered: none. No threshold passed the test; more calibration rows, a larger "
                "error or a better fit may help"
            )
        else:
            above = "all" if self.threshold == ALL else f"if {value} is above {self.threshold:.4g}"
            like = "" if self.answer_unlike else " that are not unlike what was learnt"
            lines.append(
                f"answered: texts{like}, {above}; {in_percent(self.share)} of the calibration rows "
                f"({self.answered}, {self.wrong} of them wrong)"
            )
            left = left_in_words(self.rows, self.answered, self.unlike)
            lines.append(f"for people: {left}")
        return "\n".join([*lines, f"for {way_in_words(self.method)} of round {self.round}"])

    def check(self, model: Model) -> None:
        """Refuse a promise that is not about the model's labels, by a ValueError."""
        if self.kind != model.likelihood.kind:
            raise ValueError(f"it is of kind {self.kind!r}")
        if not self.wrong <= self.answered <= self.rows:
            raise ValueError(f"{self.wrong} of {self.answered} of {self.rows} rows")
        if missing := {"chance", *_CALIBRATION[self.kind]} - self.calibration.keys():
            raise ValueError(f"its calibration has no {', '.join(sorted(missing))}")
        if any(value.shape != (self.rows,) for value in self.calibration.values()):
            raise ValueError("its calibration has another number of rows")
        if "label" in self.calibration:
            labels = self.calibration["label"]
            count = model.likelihood.num_labels(model.network.outputs)
            beyond = count is not None and bool((labels >= count).any())
            if labels.dtype != torch.int64 or beyond or bool((labels < 0).any()):
                raise ValueError(f"its labels are no classes of {count}")


@checked_call
def terms(
    model: Model,
    error: Inside | None = None,
    confidence: Inside = 0.9,
    tolerance: Positive | None = None,
    max_share_to_people: PartialShare | None = None,
) -> tuple[float | None, float, float | None, float | None]:
    """The arguments of a promise as Python's numbers, once all are checked; the error is None if it
    follows from the share to people."""
    if error is not None and max_share_to_people is not None:
        raise ConfigError(
            f"error={error}, max_share_to_people={max_share_to_people}: the one follows from the "
            "other; expected one of them"
        )
    kind = model.likelihood.kind
    if (kind == "rating") != (tolerance is not None):
        what = "a distance up to which an answer is right" if kind == "rating" else "None"
        raise ConfigError(f"tolerance={tolerance}: for kind {kind!r} expected {what}")
    error = 0.05 if error is None and max_share_to_people is None else error
    return error, confidence, tolerance, max_share_to_people


def check_rows(count: int, error: float | None, confidence: float, what: str = "rows") -> None:
    """Raise a DataError if so many calibration rows are too few."""
    fewest = rows_needed(error, confidence) if error else 1
    if count < fewest:
        raise DataError(
            f"calibration: {count} {what}; expected at least {fewest} for an error of {error:g} "
            f"with confidence {confidence:g} (enough only if no answer is wrong), and better some "
            "hundreds"
        )


def with_promise(
    posterior: P,
    calibration: object,
    asked: tuple[float | None, float, float | None, float | None],
    method: Method | None,
    answer_unlike: bool,
) -> P:
    """See `Posterior.promise`; `asked` is what `terms` returns."""
    error, confidence, tolerance, to_people = asked
    kind = posterior.model.likelihood.kind
    posterior = posterior.replace(promised=None)
    examples = _unused(posterior, posterior.encode(calibration))
    if examples.copies > BY_CHANCE * len(examples):
        warn(
            f"calibration: {examples.copies} of {len(examples)} rows repeat another's "
            "text (case and spaces aside), and each counts as an answer of its own; if texts do "
            "not come so often in use, give each once, or the promise does not hold"
        )
    check_rows(len(examples), error, confidence)
    forecast: Any = posterior.predict(examples, method=method)
    chance, wrong = forecast.chance_right(tolerance), forecast.wrong(tolerance)
    unlike = torch.zeros_like(wrong) if answer_unlike else _unlike(forecast)
    if error is not None:
        check_rows(int((~unlike).sum()), error, confidence, "rows that are like the learnt ones")
        threshold = by_error(chance[~unlike], wrong[~unlike], error, confidence)
    else:
        assert to_people is not None
        threshold, error = by_share(chance.masked_fill(unlike, ALL), wrong, to_people, confidence)
    above = torch.zeros_like(wrong) if threshold is None else (chance > threshold) & ~unlike
    promised = Promise(
        kind=kind,
        error=error,
        confidence=confidence,
        tolerance=tolerance,
        to_people=to_people,
        threshold=threshold,
        answer_unlike=answer_unlike,
        unlike=int(unlike.sum()),
        rows=len(examples),
        answered=int(above.sum()),
        wrong=int((wrong & above).sum()),
        method=forecast.method,
        round=posterior.report.id,
        calibration={"chance": chance, **calibration_of(forecast, kind)},
    )
    return posterior.replace(promised=promised)


def _unlike(forecast: Forecast) -> Tensor:
    """(N,) bool, which calibration rows are unlike what was learnt."""
    if forecast.novelty is None:
        raise DataError(
            "promise: texts unlike what was learnt cannot be told from others, for this posterior "
            "does not know what it has learnt (fewer than 19 texts, or it was made without data); "
            "expected answer_unlike=True, which answers them too"
        )
    return forecast.unlike()


def _unused(posterior: Predictor, examples: Examples) -> Examples:
    """The rows that nothing was learnt from or chosen by, nor by a student.

    Raises:
        DataError: there are none.
    """
    if any(hashes is None for hashes in posterior.used_rows):
        warn(
            "calibration: which rows this posterior has learnt is not known; nothing is promised "
            "if these are among them"
        )
    used = among(examples.hashes, *posterior.used_rows)
    if not used.any():
        return examples
    why = (
        f"calibration: {int(used.sum())} of {len(used)} rows have the text of a row that was "
        "learnt or held out (case and spaces aside)"
    )
    if used.all():
        raise DataError(f"{why}; expected other rows")
    warn(f"{why}; they are left out")
    return examples.subset((~used).nonzero().flatten())


def calibration_of(forecast: Any, kind: str) -> dict[str, Tensor]:
    """What sets and intervals need of the calibration rows."""
    if kind in ("class", "choice"):
        of_label = forecast.probabilities.double().gather(1, forecast.labels[:, None])[:, 0]
        return {"miss": 1 - of_label, "label": forecast.labels}
    if kind == "rating":
        labels, mean = forecast.labels.double(), forecast.mean.double()
        return {"residual": labels - mean, "sd": forecast.sd.double()}
    return {}


def left_in_words(count: int, answered: int, unlike: int) -> str:
    """How many of `count` texts are for people, and why.

    >>> left_in_words(60, 44, 6)
    '6 (10%) unlike what was learnt, 10 (16.7%) too unsure'
    """
    unsure = count - answered - unlike
    return (
        f"{unlike} ({in_percent(unlike / count)}) unlike what was learnt, "
        f"{unsure} ({in_percent(unsure / count)}) too unsure"
    )


def in_percent(value: float) -> str:
    """A share in per cent, with the digits that it has.

    >>> in_percent(0.05), in_percent(0.125), in_percent(0.123456)
    ('5%', '12.5%', '12.3%')
    """
    return f"{100 * value:.3g}%"
