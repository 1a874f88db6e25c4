"""Labels that come back, by `POST /feedback`: kept beside the round that answered, and watched.

`feedback.jsonl`, in the folder of the round, has a line for each: the columns of the training data,
as `bhpeft update` takes them, and in the entry `feedback` when it came, and how the round's
forecast stands to it. A label is on the disk before its request is answered. The file is the only
record: every process that serves the round reads what others append, and a new start reads it all.

A promise speaks of texts drawn at random. So labels of texts that somebody has chosen, because they
are doubtful or because someone complained, are kept but not counted (`"random": false`), and so are
those of texts that the round has learnt.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..base.checks import shown
from ..base.files import append, appended
from ..data import Examples
from ..data.columns import as_choices
from ..data.copies import among
from ..decisions.promises import Promise
from ..decisions.watching import LEVEL, Watch, largest_evidence
from ..errors import DataError, SaveError
from ..forecast import Forecast
from .engine import check_tokens
from .requests import AnyTable, Refused, check, check_table, columns_of
from .rounds import Served, Table

FILE = "feedback.jsonl"
_ENTRY = "feedback"
_LOG = logging.getLogger("uvicorn.error")  # which is shown
_ALARM = 1 / LEVEL  # an e-value, as `Watch` has it


class Answers(NamedTuple):
    """Of labels that were drawn at random, what they say of answers under a promise."""

    answered: int = 0  # texts
    wrong: int = 0  # of these
    evidence: float = 1.0  # that more are wrong than was promised, the largest e-value so far


class Tally(NamedTuple):
    """What the labels of a round say so far."""

    labels: int = 0  # how many there are
    newest: Answers = Answers()  # under the promise that is served, or else the newest

    @classmethod
    def of(cls, folder: Path, round: str) -> Tally | None:
        """That of a saved round, under the newest promise with labels; None if it has none.

        Raises:
            SaveError, OSError: the file of labels cannot be read.
        """
        entries = _entries(appended(folder / FILE)[0], round)
        # Of services that change to a new promise one after the other, some still have the old one.
        *_, newest = dict.fromkeys([None, *(entry["promise"] for entry in entries)])
        counted = [one for one in entries if one["promise"] == newest and one["counts"]]
        wrong = [one["wrong"] for one in counted if one["answered"]]
        evidence = largest_evidence(wrong, counted[-1]["promised"]) if counted else 1.0
        return cls(len(entries), Answers(len(wrong), sum(wrong), evidence)) if entries else None

    @property
    def plain(self) -> dict[str, float]:
        """The numbers, by name."""
        return {"labels": self.labels, **self.newest._asdict()}

    def __str__(self) -> str:
        answered, wrong, evidence = self.newest
        text = f"{self.labels} label{'s' * (self.labels != 1)}"
        if answered:
            text += f", {wrong} of {answered} answers wrong"
        return text + ", more than was promised" * (evidence >= _ALARM)


class LabelsRequest(BaseModel):
    """The columns of a labelled row, or several of them as `rows`."""

    model_config = ConfigDict(strict=True, extra="allow")
    rows: AnyTable | None = None
    random: bool = True
    by: str = ""


_LABELS: TypeAdapter[LabelsRequest] = TypeAdapter(LabelsRequest)
_ROWS: TypeAdapter[AnyTable] = TypeAdapter(AnyTable)


@dataclass(frozen=True)
class Labels:
    """Labelled rows of a request."""

    table: Table  # the columns of the training data, with that of the label
    random: bool  # whether the texts were drawn at random
    by: str  # who gave the labels

    @property
    def count(self) -> int:
        """How many rows."""
        return len(next(iter(self.table.values())))


def read(payload: Any, served: Served) -> Labels:
    """The labels of a request's JSON: a row, or `{"rows": [...]}`, with "random" and "by" beside.

    Raises:
        Refused: a column is missing, or cannot be read.
    """
    if not isinstance(payload, dict):
        raise Refused(422, f"got {shown(payload)}; expected an object with a text and its label")
    several, rows = "rows" in payload, payload.get("rows", [payload])
    columns, beside = columns_of(check(_ROWS, rows), served), {"random", "by"}
    # Else "Random": false would be a column that nobody reads, and the label would count.
    odd = {name for name in columns if name.lower() in beside and (several or name not in beside)}
    if odd := odd | (payload.keys() - beside - {"rows"} if several else set()):
        names = ", ".join(map(repr, sorted(odd)))
        raise Refused(
            422, f'got {names}; expected "random" and "by", in a single row or beside "rows"'
        )
    about = check(_LABELS, payload)
    table = check_table(columns, served, served.posterior.columns.target(served.kind))
    return Labels(table, about.random, about.by)


@dataclass(frozen=True)
class Seen:
    """What the labels of a round said at a moment."""

    tally: Tally
    promise: str | None  # what they say of the round's promise, in words, if it has one
    holds: bool | None  # whether nothing speaks against it


class Feedback:
    """The labels of the round that is served; one thread at a time uses it.

    Args:
        served: that round.
        tokens: the most that are predicted for the labels of a request, with padding.
    """

    def __init__(self, served: Served, tokens: int) -> None:
        self.tokens = tokens
        self._turn = threading.Lock()
        self._begin(served)

    def _begin(self, served: Served) -> None:
        promised = served.promised
        self._served, self._end, self._labels = served, 0, 0
        self._watch = None if promised is None else Watch(promised)

    def take(self, served: Served, labels: Labels) -> Seen:
        """Keep labels, and say what all labels of the round say.

        Raises:
            Refused: a label cannot be read, they are too many, or the file cannot be written.
        """
        try:
            table = {**labels.table, **_judged(served, labels, self.tokens)}
            cells = zip(*table.values(), strict=True)
            lines = (json.dumps(dict(zip(table, row, strict=True))) for row in cells)
            self.seen(served)  # whether the file was moved away, before it grows
            with self._turn:  # not while it predicts: `seen` would wait
                append(served.folder / FILE, "\n".join(lines).encode())
        except DataError as error:
            raise Refused(422, str(error)) from error
        except (SaveError, OSError) as error:  # which names a path of this machine
            _LOG.error("labels cannot be kept: %s", error)
            raise Refused(503, "the labels cannot be kept; the server's log says why") from error
        return self.seen(served)

    def seen(self, served: Served) -> Seen:
        """What the labels of a round say, with those that another process has appended.

        Raises:
            Refused: the file cannot be read.
        """
        try:
            return self._seen(served)
        except (SaveError, OSError) as error:
            _LOG.error("labels cannot be read: %s", error)
            raise Refused(503, "the labels cannot be read; the server's log says why") from error

    def _seen(self, served: Served) -> Seen:
        with self._turn:
            if served is not self._served:
                self._begin(served)
            lines, end = appended(served.folder / FILE, self._end)
            if end < self._end:
                self._begin(served)
            self._end = end
            entries = _entries(lines, served.id)
            self._labels += len(entries)
            if (watch := self._watch) is None:
                return Seen(Tally(self._labels), None, None)
            now = _which(watch.promise)
            counted = [one for one in entries if one["counts"] and one["promise"] == now]
            watch.count([one["wrong"] for one in counted if one["answered"]])
            newest = Answers(watch.answered, watch.wrong, watch.evidence)
            return Seen(Tally(self._labels, newest), str(watch), watch.holds)


def _which(promise: Promise | None) -> str | None:
    """A short name of a promise, another one for each."""
    if promise is None:
        return None
    rows = promise.calibration["chance"].numpy().tobytes()
    return sha256(str(promise).encode() + rows).hexdigest()[:12]


def _judged(served: Served, labels: Labels, tokens: int) -> dict[str, list[Any]]:
    """The columns that a request may have in several forms, in one of them, and the entry: how the
    round's forecast stands to each label."""
    posterior = served.posterior
    examples = posterior.encode(labels.table)
    check_tokens(examples, slice(None), tokens)
    forecast = posterior.predict(examples, method=served.method)
    promised = forecast.promised
    tolerance = None if promised is None else promised.tolerance
    judged = served.kind != "rating" or promised is not None
    nothing: list[Any] = [None] * len(forecast)
    learnt = among(examples.hashes, *posterior.used_rows).tolist()
    about = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "round": served.id,
        "by": labels.by,
        "promised": None if promised is None else promised.error,
        "promise": _which(promised),
    }
    columns = {
        "wrong": forecast.wrong(tolerance).tolist() if judged else nothing,
        "answered": nothing if promised is None else promised.answers(forecast).tolist(),
        "counts": [promised is not None and labels.random and not old for old in learnt],
    }
    cells = zip(*columns.values(), strict=True)
    entries = [about | dict(zip(columns, row, strict=True)) for row in cells]
    return {**_called(examples, forecast, labels.table, served), _ENTRY: entries}


def _called(
    examples: Examples, forecast: Forecast, table: Table, served: Served
) -> dict[str, list[Any]]:
    """The column of labels: the names of classes, the position of a choice, a rating. And that of
    choices, as lists."""
    assert examples.labels is not None
    columns = served.posterior.columns
    kept = {columns.target(served.kind): forecast.named(examples.labels)}
    if examples.kind == "choice":
        kept[columns.choices] = [as_choices(cell)[0] for cell in table[columns.choices]]
    return kept


def _entries(lines: Sequence[bytes], round: str) -> list[dict[str, Any]]:
    """The entries of a round; other rounds may have been saved in the same folder before it."""
    entries = []
    for line in lines:
        with suppress(ValueError, TypeError, LookupError, RecursionError):  # of somebody else's
            entry = json.loads(line)[_ENTRY]
            entries += [entry] if entry["round"] == round and _is_whole(entry) else []
    return entries


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry has what counting it takes."""
    match entry:
        case {"promise": str() | None, "counts": False}:
            return True
        case {
            "promise": str(),
            "promised": float(error),
            "counts": True,
            "answered": bool(),
            "wrong": bool(),
        }:
            return error > 0
    return False
