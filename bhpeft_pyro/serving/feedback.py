"""Labels that come back, by `POST /feedback`: kept beside the round that answered, and watched.

`feedback.db`, in the folder of the round, is a `base.log.Log` with the columns of the training
data, as `bhpeft update` takes them, and how the round's forecast stands to each label. A label is
on the disk before its request is answered. The file is the only record: it is read anew whenever
somebody asks what the labels say, so processes that serve the same round say the same.

A promise speaks of texts drawn at random. So labels of texts that somebody has chosen, because they
are doubtful or because someone complained, are kept but not counted (`"random": false`), and so are
those of texts that the round has learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..base.checks import shown
from ..base.log import Log
from ..data import Examples
from ..data.columns import as_choices
from ..data.copies import among, keys_of
from ..decisions.promises import Promise
from ..decisions.watching import LEVEL, Watch, largest_evidence
from ..errors import DataError, SaveError
from ..forecast import Forecast
from .engine import check_tokens
from .requests import AnyTable, Refused, check, check_table, columns_of
from .rounds import Served, Table

FILE = "feedback.db"
_JUDGED = ("wrong", "answered", "counts", "promised", "promise")  # columns beside the labels
_NEWEST = (  # of workers that change to a new promise one after the other, some have the old one
    "SELECT promise, promised FROM labels WHERE round = ? AND promise IS NOT NULL "
    "GROUP BY promise ORDER BY min(rowid) DESC LIMIT 1"
)
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
        log = Log(folder / FILE)
        if not (labels := _count(log, round)):
            return None
        newest = log.read(_NEWEST, round)
        if not newest:
            return cls(labels)
        wrong = _wrong(log, round, newest[0]["promise"])
        evidence = largest_evidence(wrong, newest[0]["promised"])
        return cls(labels, Answers(len(wrong), sum(wrong), evidence))

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
    """The labels of the round that is served; any thread may use it.

    Args:
        tokens: the most that are predicted for the labels of a request, with padding.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def take(self, served: Served, labels: Labels) -> Seen:
        """Keep labels, and say what all labels of the round say.

        Raises:
            Refused: a label cannot be read, they are too many, or the file cannot be written.
        """
        columns = (*served.texts, *served.numbers, served.posterior.columns.target(served.kind))
        try:
            log = Log(served.folder / FILE, columns, _JUDGED)
            rows = _judged(served, labels, self.tokens)
        except DataError as error:
            raise Refused(422, str(error)) from error
        with _refusing("kept"):
            log.add(rows)
        return self.seen(served)

    def seen(self, served: Served) -> Seen:
        """What the labels of a round say, also those that another process has kept.

        Raises:
            Refused: the file cannot be read.
        """
        log, promised = Log(served.folder / FILE), served.promised
        with _refusing("read"):
            labels = _count(log, served.id)
            wrong = [] if promised is None else _wrong(log, served.id, _which(promised))
        if promised is None:
            return Seen(Tally(labels), None, None)
        watch = Watch(promised).count(wrong)
        newest = Answers(watch.answered, watch.wrong, watch.evidence)
        return Seen(Tally(labels, newest), str(watch), watch.holds)


def _count(log: Log, round: str) -> int:
    """How many labels of a round there are; others may have been saved in its folder before it."""
    rows = log.read("SELECT count(*) AS labels FROM labels WHERE round = ?", round)
    return int(rows[0]["labels"]) if rows else 0


def _wrong(log: Log, round: str, promise: str | None) -> list[bool]:
    """Of the answers under a promise to texts drawn at random, in the order in which their labels
    came, whether each is wrong."""
    asked = "round = ? AND promise = ? AND counts AND answered"
    rows = log.read(f"SELECT wrong FROM labels WHERE {asked} ORDER BY rowid", round, promise)
    return [bool(row["wrong"]) for row in rows]


@contextmanager
def _refusing(done: str) -> Iterator[None]:
    """Refuse a request if the file cannot be used; only the log of the server says its path."""
    try:
        yield
    except (SaveError, OSError) as error:
        _LOG.error("labels cannot be %s: %s", done, error)
        raise Refused(503, f"the labels cannot be {done}; the server's log says why") from error


def _which(promise: Promise | None) -> str | None:
    """A short name of a promise, another one for each."""
    if promise is None:
        return None
    rows = promise.calibration["chance"].numpy().tobytes()
    return sha256(str(promise).encode() + rows).hexdigest()[:12]


def _judged(served: Served, labels: Labels, tokens: int) -> list[dict[str, Any]]:
    """The rows of the log: labels, and how the round's forecast stands to them."""
    posterior = served.posterior
    examples = posterior.encode(labels.table)
    check_tokens(examples, slice(None), tokens)
    forecast = posterior.predict(examples, method=served.method)
    promised = forecast.promised
    nothing: list[Any] = [None] * len(forecast)
    judged = served.kind != "rating" or promised is not None
    tolerance = None if promised is None else promised.tolerance
    learnt = among(examples.hashes, *posterior.used_rows).tolist()
    columns = {
        **labels.table,
        **_in_one_form(examples, forecast, labels.table, served),
        "wrong": forecast.wrong(tolerance).tolist() if judged else nothing,
        "answered": nothing if promised is None else promised.answers(forecast).tolist(),
        "counts": [promised is not None and labels.random and not old for old in learnt],
    }
    choices = columns[posterior.columns.choices] if served.kind == "choice" else ()
    columns["key"] = keys_of(examples.hashes, choices)
    about = {
        "person": labels.by,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "round": served.id,
        "action": "label",
        "promised": None if promised is None else promised.error,
        "promise": _which(promised),
    }
    cells = zip(*columns.values(), strict=True)
    return [{**dict(zip(columns, row, strict=True)), **about} for row in cells]


def _in_one_form(
    examples: Examples, forecast: Forecast, table: Table, served: Served
) -> dict[str, list[Any]]:
    """The columns that a request may have in several forms: labels, which become the names of
    classes, the position of a choice or a rating; and choices, which become lists."""
    assert examples.labels is not None
    columns = served.posterior.columns
    kept = {columns.target(served.kind): forecast.named(examples.labels)}
    if served.kind == "choice":
        kept[columns.choices] = [as_choices(cell)[0] for cell in table[columns.choices]]
    return kept
