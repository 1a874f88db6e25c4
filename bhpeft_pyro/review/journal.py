"""What people decided: a journal that only grows, and the table of labels that follows from it.

A decision is on the disk (fsync) before the page shows the next text. A line that a kill has cut
was never confirmed, and is left out. Several processes may write: each line is appended under a
lock, and what others have written is read first. A whole line that is no decision was altered by
hand, and is refused: a label would be lost without a word.
"""

from __future__ import annotations

import json
import threading
from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..base.files import alone, append, appended
from ..base.values import checked_dataclass
from ..data.table import write
from ..errors import DataError
from .pool import ABOUT, Pool

Action = Literal["label", "none", "skip", "undo"]
"""A label; that none of the labels fits; later; and that the decision before is taken back."""

_when = attrgetter("at")


@checked_dataclass
class Decision:
    """What one person said of one text.

    Attributes:
        key: the text, as `Pool.items` has it.
        who: the person's name.
        action: what was decided.
        label: as the table of labels will have it: a class, a list of them, a number.
        note: the person's own words.
        at: when, in UTC as ISO 8601 has it; by default when the journal adds it.
        round: id of the round whose prediction was shown.
    """

    key: str
    who: str
    action: Action
    label: Any = None
    note: str = ""
    at: str = ""
    round: str = ""


class Journal:
    """The decisions in a file, of all people, and the last one of each about each text.

    Args:
        path: a file of JSON lines; made with the first decision.

    >>> import tempfile
    >>> journal = Journal(Path(tempfile.mkdtemp()) / "labels.journal.jsonl")
    >>> journal.add(Decision("a1", "Ana", "label", "billing"))
    >>> journal.add(Decision("a1", "Bo", "label", "product"))
    >>> journal.add(Decision("a1", "Bo", "undo"))
    >>> [(one.who, one.label) for one in Journal(journal.path).of_text("a1")]
    [('Ana', 'billing')]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: dict[str, list[Decision]] = {}  # of each person, but those taken back
        self._by_text: dict[str, dict[str, Decision]] = {}  # the last of each person
        self._read = self._lines = 0  # bytes, and the lines in them
        self._thread = threading.RLock()
        self.refresh()

    def add(self, decision: Decision) -> None:
        """Append a decision; it is on the disk when this returns. Of a person's decisions about a
        text the last by time counts, not an older one from elsewhere that is added later."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._thread:
            self.refresh()
            last = self._made.get(decision.who, ())[-1:]  # a clock may have been set back
            at = decision.at or max([now, *map(_when, last)])
            line = json.dumps(asdict(decision) | {"at": at}, ensure_ascii=False)
            append(self.path, line.encode(errors="backslashreplace"))
            self.refresh()

    def refresh(self) -> None:
        """Read what has been appended since the last time, by any process; or all anew, if lines
        were removed."""
        with self._thread:
            lines, end = appended(self.path, self._read)
            before = self._lines if end >= self._read else 0
            decisions = [
                _decision(line, f"{self.path.name}, line {number}")
                for number, line in enumerate(lines, before + 1)
                if line.strip()  # an editor may leave one that is empty
            ]
            if end < self._read:
                self._made, self._by_text = {}, {}
            self._read, self._lines = end, before + len(lines)
            for decision in decisions:
                self._take(decision)

    def _take(self, decision: Decision) -> None:
        made = self._made.setdefault(decision.who, [])
        of_text = self._by_text.setdefault(decision.key, {})
        about = (i for i in reversed(range(len(made))) if made[i].key == decision.key)
        if decision.action != "undo":
            insort(made, decision, key=_when)
            of_text[decision.who] = max(decision, of_text.get(decision.who, decision), key=_when)
        elif (last := next(about, None)) is not None:
            del made[last]  # and what was said of this text before it counts again
            del of_text[decision.who]
            of_text |= {one.who: one for one in made if one.key == decision.key}

    def of_text(self, key: str) -> list[Decision]:
        """What each person said last of a text."""
        with self._thread:
            return [*self._by_text.get(key, {}).values()]

    def of_person(self, who: str) -> list[Decision]:
        """What a person said last of each text, the newest first."""
        with self._thread:
            newest: dict[str, Decision] = {}
            for one in reversed(self._made.get(who, ())):
                newest.setdefault(one.key, one)
            return [*newest.values()]

    @property
    def people(self) -> list[str]:
        """All who have decided something."""
        with self._thread:
            return sorted(who for who, made in self._made.items() if made)

    @property
    def texts(self) -> list[str]:
        """All texts about which somebody has decided something."""
        with self._thread:
            return [key for key, decisions in self._by_text.items() if decisions]

    def write_table(self, out: Path, pool: Pool) -> int:
        """Write the labels as `bhpeft update` takes them (`labelled`); how many there are."""
        names = dict.fromkeys(name for record in pool.records for name in record)
        names |= dict.fromkeys((pool.column, *ABOUT))
        with self._thread, alone(self.path):  # nobody adds to what is written
            self.refresh()
            rows = labelled((one for key in self.texts for one in self.of_text(key)), pool)
            write(out, pd.DataFrame(rows, columns=[*names], dtype=object))
        return len(rows)


def labelled(decisions: Iterable[Decision], pool: Pool) -> list[dict[str, Any]]:
    """Rows of the data with the label that people agree on, who gave it, and their notes.

    Texts without such a label (`agreed`), and texts that are not in the pool, are left out. The
    rows are as `Posterior.update` takes them.

    Raises:
        DataError: a label is of another kind than the pool's.
    """
    by_text: dict[str, dict[str, Decision]] = {}
    for one in decisions:
        of_text = by_text.setdefault(one.key, {})
        of_text[one.who] = max(one, of_text.get(one.who, one), key=_when)
    rows = []
    for key, of_text in by_text.items():
        if (item := pool.items.get(key)) is None:
            continue
        given = [one for one in of_text.values() if one.action == "label"]
        for one in given:
            pool.check(one.label, f"label of {one.who!r:.60} for the text {key!r:.60}")
        label = agreed([*of_text.values()], pool.kind)
        if label is None:
            continue
        if pool.kind != "rating":  # of which the label is the mean
            given = [one for one in given if one.label == label]
        notes = " / ".join(one.note for one in given if one.note)
        about = zip(ABOUT, (", ".join(one.who for one in given), notes), strict=True)
        rows.append({**pool.records[item.row], pool.column: label, **dict(about)})
    return rows


def agreed(decisions: list[Decision], kind: str) -> Any:
    """The label of a text by what people decided; None if there is none.

    Of ratings it is the mean. Otherwise it is what most people say, and none if as many say
    something else, or most say that none fits.

    >>> ana, bo, cy = (Decision("a1", who, "label", "good") for who in ("Ana", "Bo", "Cy"))
    >>> agreed([ana, Decision("a1", "Bo", "label", "bad")], "class")
    >>> agreed([ana, Decision("a1", "Bo", "label", "bad"), cy], "class")
    'good'
    """
    labels = [one.label for one in decisions if one.action == "label"]
    if kind == "rating":
        return sum(labels) / len(labels) if labels else None
    votes = Counter(json.dumps(one.label) for one in decisions if one.action in ("label", "none"))
    ranked = votes.most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return json.loads(ranked[0][0])


def _decision(line: bytes, where: str) -> Decision:
    """A line of the journal, which people may have altered."""
    try:
        return Decision(**json.loads(line))
    except (RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}, is no decision: {error!s:.100}; correct the line, or remove it"
        ) from None
