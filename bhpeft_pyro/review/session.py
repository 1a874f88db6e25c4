"""Who is shown which text, and what becomes of the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..base.values import Count, checked_call, valid
from ..errors import DataError, SaveError, WriteError
from .journal import Decision, Journal
from .pool import Item, Pool

_LEASE = 600.0  # seconds that a text is kept for the person who sees it


@dataclass(frozen=True)
class Progress:
    """How far a person has come.

    Attributes:
        mine: texts that this person has decided.
        left: those that are left for this person.
        labels: rows of the table of labels, of all people.
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
        journal: where decisions go, and were.
        out: the table of labels, which is written anew with each of them.
        people: how many are to decide each text.

    >>> import tempfile
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "new.csv").write_text("text\\nw5 w9\\nw30 w31\\n")
    >>> pool = Pool.of(posterior, folder / "new.csv")
    >>> session = Session(pool, Journal(folder / "journal.jsonl"), folder / "labels.csv")
    >>> for_ana = session.next_for("Ana")
    >>> session.decide("Ana", for_ana, "label", ["1"], note="")
    >>> session.labels, session.next_for("Ana") == pool.order[1]
    (1, True)
    """

    @checked_call
    def __init__(self, pool: Pool, journal: Journal, out: Path, people: Count = 1) -> None:
        self.journal, self.out = journal, out
        self.people = people
        self._shown: dict[str, tuple[str, float]] = {}  # text to person and time
        self._lock = threading.RLock()
        self.labels = 0
        self.take(pool)

    def take(self, pool: Pool) -> None:
        """Go on with another pool of the same texts: the queue of a new round.

        Raises:
            DataError: the journal is of other texts.
        """
        if lost := sum(key not in pool.items for key in self.journal.texts):
            raise DataError(
                f"out: {self.journal.path} has decisions about {lost} texts that the data lack, "
                f"and {self.out.name} would lose them; expected the same data, or another file"
            )
        with self._lock:
            self.pool, self._asked = pool, frozenset(pool.order)
            if self.journal.path.exists():
                self._write()

    def _write(self) -> None:
        try:
            self.labels = self.journal.write_table(self.out, self.pool)
        except SaveError as error:
            kept = f"the decision is kept in {self.journal.path.name}, but the table is not written"
            raise WriteError(f"{kept}; the next decision tries again: {error}") from error

    def next_for(self, who: str) -> str | None:
        """The text that a person is asked about next; None if there is none.

        Not one that somebody else sees now, but that others have skipped. What the person has
        skipped comes at the end.
        """
        with self._lock:
            self.journal.refresh()
            now, found = time.monotonic(), []
            for key in self.pool.order:
                if (skip := self._wanted(key, who)) is None:
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

    def _wanted(self, key: str, who: str) -> str | None:
        """When a person has skipped a text that they may decide, "" if they have not; None if they
        have decided it, or as many others as were asked for have."""
        decisions = self.journal.of_text(key)
        mine = next((one for one in decisions if one.who == who), None)
        made = sum(one.action != "skip" for one in decisions)
        if made >= self.people or (mine and mine.action != "skip"):
            return None
        return mine.at if mine else ""

    def decide(self, who: str, key: str, action: str, given: Sequence[str], note: str) -> None:
        """Keep what a person decided of a text.

        Args:
            who: the person.
            key: the text.
            action: "label", "none" or "skip".
            given: for "label" the numbers of the options, or the rating, as text.
            note: the person's own words.

        Raises:
            DataError: there is no such text, or it cannot have such a label; says why.
            WriteError: the disk is full; says so if the decision is kept.
        """
        valid(Literal["label", "none", "skip"], "action", action)
        item = self.item(key)
        label = self._label(item, given) if action == "label" else None
        if action == "none" and self.pool.kind == "labels":
            action, label = "label", item.together([])
        with self._lock:
            kept = Decision(key, who, action, label, note.strip(), round=self.pool.round)  # type: ignore[arg-type]
            self.journal.add(kept)
            self._shown.pop(key, None)
            self._write()

    def item(self, key: str) -> Item:
        """The text with a key."""
        if key not in self.pool.items:
            raise DataError(f"text: there is none with the key {key[:40]!r} in this table")
        return self.pool.items[key]

    def _label(self, item: Item, given: Sequence[str]) -> Any:
        if self.pool.kind == "rating":
            try:
                number = float(given[0])
            except (ValueError, IndexError):
                raise DataError("rating: expected a number, such as 3.5") from None
            return self.pool.rating(number)
        numbers = {str(number): number for number in range(len(item.options))}
        several = self.pool.kind == "labels"
        if not given or not {*given} <= numbers.keys() or (len(given) > 1 and not several):
            raise DataError("label: expected one of those that are shown")
        return self.pool.label(item, [numbers[one] for one in given])

    def undo(self, who: str) -> str | None:
        """Take back a person's last decision; the text that it was about."""
        with self._lock:
            mine = self.recent(who, 1)
            if not mine:
                return None
            self.journal.add(Decision(mine[0].key, who, "undo", round=self.pool.round))
            self._shown[mine[0].key] = who, time.monotonic()
            self._write()
            return mine[0].key

    def recent(self, who: str, count: int = 10) -> list[Decision]:
        """A person's last decisions about texts of this table, the newest first."""
        mine = self.journal.of_person(who)
        return [one for one in mine if one.key in self.pool.items][:count]

    def progress(self, who: str) -> Progress:
        """How far a person has come."""
        mine = sum(one.action != "skip" for one in self.recent(who, len(self.pool.items)))
        over = sum(
            self._wanted(key, who) is None for key in self.journal.texts if key in self._asked
        )
        return Progress(mine, len(self._asked) - over, self.labels)

    def agreement(self) -> Agreement:
        """Whether people who have decided the same texts agree."""
        texts, same, distances, apart = 0, 0, [], []
        for key in self.journal.texts:
            votes = [one.label for one in self.journal.of_text(key) if one.action != "skip"]
            if len(votes) < 2 or key not in self.pool.items:
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
