"""Who is shown which text, and what becomes of the answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from ..base.log import Log, agreed, last
from ..base.values import Count, checked_call, valid
from ..errors import DataError
from .pool import NOTE, Item, Pool

Action = Literal["label", "none", "skip"]
"""A label; that none of the labels fits; and later."""

_LEASE = 600.0  # seconds that a text is kept for the person who sees it


@dataclass(frozen=True)
class Decision:
    """What one person said of one text.

    Attributes:
        key: the text, as `Pool.items` has it.
        person: their name.
        action: what was decided.
        label: as the data have it: a class, a list of them, a number.
        note: the person's own words.
        time: when, in UTC as ISO 8601 has it; by default when it is kept.
        round: id of the round whose prediction was shown.
    """

    key: str
    person: str
    action: Action
    label: Any = None
    note: str = ""
    time: str = ""
    round: str = ""

    def row(self, pool: Pool) -> dict[str, Any]:
        """The row of the log: the text beside the decision."""
        row = asdict(self)
        label = row.pop("label")
        return {**row, **pool.records[pool.items[self.key].row], pool.column: label}


def labelled(decisions: Iterable[Decision], pool: Pool) -> list[dict[str, Any]]:
    """Rows of the data with the label that people agree on (`base.log.agreed`), as
    `Posterior.update` takes them; decisions about texts that are not in the pool are left out."""
    rows = [one.row(pool) for one in decisions if one.key in pool.items]
    return agreed(sorted(rows, key=itemgetter("time")), pool.column)


@dataclass(frozen=True)
class Snapshot:
    """What the log says at a moment.

    Attributes:
        version: that of the log.
        pool: the texts that it is about.
        decisions: the last one of each person about each text of the pool, the oldest first.
        by_text: the same by text and person.
        labels: on how many texts of the log people have a label.
    """

    version: int
    pool: Pool
    decisions: Sequence[Decision]
    by_text: Mapping[str, Mapping[str, Decision]]
    labels: int


@dataclass(frozen=True)
class Progress:
    """How far a person has come.

    Attributes:
        mine: texts that this person has decided.
        left: those that are left for this person.
        labels: on how many texts of the log all people together have a label.
    """

    mine: int
    left: int
    labels: int


@dataclass(frozen=True)
class Agreement:
    """Of texts that several people have decided: how many there are, on how many all agree, the
    mean distance of ratings, and some on which they do not agree."""

    texts: int
    same: int
    distance: float | None
    open: tuple[str, ...]


class Session:
    """The texts of a pool, shared out among people.

    Args:
        pool: the texts, and their order.
        out: the file for what people decide, a `base.log.Log`; it may have decisions already.
        people: how many are to decide each text.

    Raises:
        DataError: the file has other columns.

    >>> import tempfile
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "new.csv").write_text("text\\nw5 w9\\nw30 w31\\n")
    >>> pool = Pool.of(posterior, folder / "new.csv")
    >>> session = Session(pool, folder / "labels.db")
    >>> for_ana = session.next_for("Ana")
    >>> session.decide("Ana", for_ana, "label", ["1"], note="")
    >>> session.labels, session.next_for("Ana") == pool.order[1]
    (1, True)
    """

    @checked_call
    def __init__(self, pool: Pool, out: Path, people: Count = 1) -> None:
        self.people = people
        self.log = Log(out, pool.columns, (NOTE,))
        if (names := self.log.names) and {*names} != {*self.log.columns}:
            raise DataError(
                f"out: {out} has the columns {', '.join(names)}; expected "
                f"{', '.join(self.log.columns)}, or another file"
            )
        self._read: Snapshot | None = None
        self._shown: dict[str, tuple[str, float]] = {}  # text to person and time
        self._lock = threading.RLock()
        self.take(pool)

    def take(self, pool: Pool) -> None:
        """Go on with another pool of the same texts: the queue of a new round."""
        with self._lock:
            self.pool, self._asked = pool, frozenset(pool.order)

    def keep(self, decisions: Iterable[Decision]) -> None:
        """Add decisions to the log, all or none. Of a person's decisions about a text the last by
        time counts, not an older one from elsewhere that is added later.

        Raises:
            WriteError: the file cannot be written.
        """
        self.log.add([one.row(self.pool) for one in decisions])

    def snapshot(self) -> Snapshot:
        """What people have said so far, in this page or elsewhere."""
        version, pool, before = self.log.version, self.pool, self._read
        if before is not None and before.version == version and before.pool is pool:
            return before
        rows = self.log.rows()
        decisions = [self._decision(row) for row in last(rows) if row["key"] in pool.items]
        by_text: dict[str, dict[str, Decision]] = {}
        for one in decisions:
            by_text.setdefault(one.key, {})[one.person] = one
        labels = len(agreed(rows, pool.column))
        self._read = Snapshot(version, pool, decisions, by_text, labels)
        return self._read

    def _decision(self, row: Mapping[str, Any]) -> Decision:
        label = row[self.pool.column]
        if self.pool.kind == "labels" and label is not None:
            label = json.loads(label)
        names = ("key", "person", "action", NOTE, "time", "round")
        return Decision(label=label, **{name: row[name] for name in names})

    @property
    def names(self) -> list[str]:
        """All who have decided something."""
        return sorted({one.person for one in self.snapshot().decisions})

    @property
    def labels(self) -> int:
        """On how many texts of the log people have a label."""
        return self.snapshot().labels

    def next_for(self, who: str) -> str | None:
        """The text that a person is asked about next; None if there is none.

        Not one that somebody else sees now, but that others have skipped. What the person has
        skipped comes at the end.
        """
        with self._lock:
            decisions, now, found = self.snapshot().by_text, time.monotonic(), []
            for key in self.pool.order:
                if (skip := self._wanted(decisions.get(key, {}), who)) is None:
                    continue
                person, when = self._shown.get(key, (who, now))
                if self.people == 1 and person != who and now - when < _LEASE:
                    continue
                found.append((skip, key))
                if not skip:
                    break
            if not found:
                return None
            _, chosen = min(found)
            self._shown[chosen] = who, now
            return chosen

    def _wanted(self, of_text: Mapping[str, Decision], who: str) -> str | None:
        """When a person has skipped a text that they may decide, "" if they have not; None if they
        have decided it, or as many others as were asked for have."""
        mine = of_text.get(who)
        votes = sum(one.action != "skip" for one in of_text.values())
        if votes >= self.people or (mine and mine.action != "skip"):
            return None
        return mine.time if mine else ""

    def decide(self, who: str, key: str, action: str, chosen: Sequence[str], note: str) -> None:
        """Keep what a person decided of a text.

        Args:
            who: the person.
            key: the text.
            action: "label", "none" or "skip".
            chosen: for "label" the numbers of the options, or the rating, as text.
            note: the person's own words.

        Raises:
            DataError: there is no such text, or it cannot have such a label; says why.
            WriteError: the decision cannot be kept, such as on a full disk.
        """
        valid(Action, "action", action)
        item = self.item(key)
        label = self._label(item, chosen) if action == "label" else None
        if action == "none" and self.pool.kind == "labels":
            action, label = "label", item.together([])
        with self._lock:
            self.keep([Decision(key, who, action, label, note.strip(), round=self.pool.round)])  # type: ignore[arg-type]
            self._shown.pop(key, None)

    def item(self, key: str) -> Item:
        """The text with a key."""
        if key not in self.pool.items:
            raise DataError(f"text: there is none with the key {key[:40]!r} in this table")
        return self.pool.items[key]

    def _label(self, item: Item, chosen: Sequence[str]) -> Any:
        if self.pool.kind == "rating":
            return self.pool.rating(chosen[0] if chosen else None)
        numbers = {str(number): number for number in range(len(item.options))}
        several = self.pool.kind == "labels"
        if not chosen or not {*chosen} <= numbers.keys() or (len(chosen) > 1 and not several):
            raise DataError("label: expected one of those that are shown")
        return self.pool.label(item, [numbers[one] for one in chosen])

    def undo(self, who: str) -> str | None:
        """Take back a person's last decision; the text that it was about."""
        with self._lock:
            if not (mine := self.recent(who, 1)):
                return None
            self.log.undo(mine[0].key, who)
            self._shown[mine[0].key] = who, time.monotonic()
            return mine[0].key

    def recent(self, who: str, count: int = 10) -> list[Decision]:
        """A person's last decisions about texts of the pool, the newest first."""
        mine = [one for one in reversed(self.snapshot().decisions) if one.person == who]
        return mine[:count]

    def progress(self, who: str) -> Progress:
        """How far a person has come."""
        read = self.snapshot()
        votes = [one for one in read.decisions if one.person == who and one.action != "skip"]
        over = sum(
            self._wanted(of_text, who) is None
            for key, of_text in read.by_text.items()
            if key in self._asked
        )
        return Progress(len(votes), len(self._asked) - over, read.labels)

    def agreement(self) -> Agreement:
        """Whether people who have decided the same texts agree."""
        texts, same, distances, apart = 0, 0, [], []
        for key, of_text in self.snapshot().by_text.items():
            votes = [one.label for one in of_text.values() if one.action != "skip"]
            if len(votes) < 2:
                continue
            texts += 1
            same += all(vote == votes[0] for vote in votes)
            numbers = [vote for vote in votes if vote is not None]
            if self.pool.kind == "rating" and numbers:
                distances.append(max(numbers) - min(numbers))
            elif any(vote != votes[0] for vote in votes):
                apart.append(key)
        mean = sum(distances) / len(distances) if distances else None
        return Agreement(texts, same, mean, tuple(apart))
