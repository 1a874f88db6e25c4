"""What people say of texts, in one SQLite file: decisions of a review, labels that come back.

The table `labels` has a row for each decision: the columns of the data, the label as the last of
them; who decided, when, and on which round's forecast; what was decided; and a key, which copies of
a text share. Lists are JSON.

A row is on the disk when `Log.add` returns, and after a kill all rows of a call are there or none.
`synchronous=EXTRA` also flushes the removal of SQLite's journal, without which a power cut could
take back the last rows. The journal is SQLite's default one, no write-ahead log: between two writes
all rows are in one file, which can be copied.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import DataError, WriteError

OURS = ("person", "time", "round", "action", "key")
"""Columns beside those of the data. `action` is "label"; "none", if no label fits; or "skip"."""

_WAIT = 60.0  # seconds that a writer waits for others; each takes milliseconds

Row = Mapping[str, Any]


class Log:
    """The rows of a file, for any number of threads and processes.

    Args:
        path: the file; made with the first row.
        columns: of the data, the label last.
        more: columns of whoever writes.

    Raises:
        DataError: a column of the data is called as one of the others.

    >>> import tempfile
    >>> log = Log(Path(tempfile.mkdtemp()) / "labels.db", ["text", "label"])
    >>> row = {"text": "late", "round": "r1", "action": "label", "key": "a1"}
    >>> log.add([row | {"person": "Ana", "label": "billing"}])
    >>> log.add([row | {"person": "Bo", "label": "delivery"}])
    >>> log.undo("a1", "Bo")
    >>> [(row["person"], row["label"]) for row in log.rows()]
    [('Ana', 'billing')]
    """

    def __init__(self, path: Path, columns: Sequence[str] = (), more: Sequence[str] = ()) -> None:
        check_columns(columns, more)
        self.path = path
        self.columns = (*columns, *OURS, *more)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, all or none; they are on the disk when this returns. Without a time they get
        that of now, or of the person's last row, if a clock was set back.

        Raises:
            WriteError: the file cannot be written.
        """
        columns = ", ".join(map(_quoted, self.columns))
        insert = f"INSERT INTO labels ({columns}) VALUES ({', '.join('?' * len(self.columns))})"
        with self._writing("rwc") as db:
            db.execute(f"CREATE TABLE IF NOT EXISTS labels ({columns})")
            for row in rows:
                time = row.get("time") or _now(db, row["person"])
                row = {**row, "time": time}
                db.execute(insert, [_plain(row.get(name)) for name in self.columns])

    def undo(self, key: str, person: str) -> None:
        """Remove what a person said last of a text, so that what they said before counts.

        Raises:
            WriteError: the file cannot be written.
        """
        with self._writing("rw") as db:
            db.execute(
                "DELETE FROM labels WHERE rowid = (SELECT rowid FROM labels "
                "WHERE key = ? AND person = ? ORDER BY time DESC, rowid DESC LIMIT 1)",
                (key, person),
            )

    def rows(self) -> list[dict[str, Any]]:
        """All rows, the oldest first, with their numbers as `rowid`."""
        return self.read("SELECT rowid, * FROM labels ORDER BY time, rowid")

    def read(self, query: str, *values: object) -> list[dict[str, Any]]:
        """The rows that a query of the table `labels` selects; none as long as there is no table.

        Raises:
            WriteError: the file cannot be read.
        """
        if not self.names:
            return []
        with self._opened("rw") as db:
            db.row_factory = sqlite3.Row
            return [*map(dict, db.execute(query, values))]

    @property
    def names(self) -> list[str]:
        """The columns of the table in the file."""
        if not self.path.exists():
            return []
        with self._opened("rw") as db:
            return [name for _, name, *_ in db.execute("PRAGMA table_info(labels)")]

    @property
    def version(self) -> int:
        """Another number after each call that writes."""
        if not self.path.exists():
            return 0
        with self._opened("rw") as db:
            return int(db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _writing(self, mode: str) -> Iterator[sqlite3.Connection]:
        with self._opened(mode) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"PRAGMA user_version = {secrets.randbits(31)}")
            yield db

    @contextmanager
    def _opened(self, mode: str) -> Iterator[sqlite3.Connection]:
        # A reader may write, too: it rolls back what a kill has left.
        address = f"{self.path.resolve().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(address, timeout=_WAIT, uri=True)) as db, db:
                db.execute("PRAGMA synchronous=EXTRA")
                db.execute("PRAGMA trusted_schema=OFF")  # nothing of the file is executed
                yield db
        except sqlite3.Error as error:
            raise WriteError(f"path: {self.path} cannot be read or written: {error}") from error


def check_columns(columns: Iterable[str], more: Iterable[str] = ()) -> None:
    """Refuse columns of the data that are called as one of a log's own."""
    for name in columns:
        if name.lower() in (*OURS, *more):  # SQLite's names have no case
            raise DataError(f"column {name!r}: the labels have one of this name; rename yours")


def agreed(rows: Iterable[Row], label: str) -> list[dict[str, Any]]:
    """A row for each text with a label that people agree on, with all who gave it and their notes.

    Of each person the last row about a text counts. Of ratings (float) the label is the mean.
    Otherwise it is what most people say; there is none if as many say something else, or most say
    that none fits.

    Args:
        rows: the oldest first.
        label: the column of the label.

    >>> ana, bo = ({"key": "a1", "person": who, "action": "label"} for who in ("Ana", "Bo"))
    >>> [row["label"] for row in agreed([ana | {"label": 2.0}, bo | {"label": 3.0}], "label")]
    [2.5]
    >>> agreed([ana | {"label": "good"}, bo | {"label": "bad"}], "label")
    []
    """
    by_text: dict[str, list[Row]] = {}
    for row in last(rows):
        by_text.setdefault(row["key"], []).append(row)
    return [one for of_text in by_text.values() if (one := _agreed(of_text, label))]


def last(rows: Iterable[Row]) -> list[Row]:
    """The last row of each person about each text, the oldest first, as `rows` are."""
    newest: dict[tuple[str, str], Row] = {}
    for row in rows:
        of = row["key"], row["person"]
        newest.pop(of, None)  # which would keep its place
        newest[of] = row
    return [*newest.values()]


def _agreed(rows: Sequence[Row], label: str) -> dict[str, Any] | None:
    """That of a text, by the last row of each person."""
    labels = [row for row in rows if row["action"] == "label"]
    ratings = [row[label] for row in labels if isinstance(row[label], float)]
    if ratings and len(ratings) == len(labels):
        value = sum(ratings) / len(ratings)
    else:
        votes = Counter(_plain(row[label]) for row in rows if row["action"] != "skip")
        most = [vote for vote, count in votes.items() if count == max(votes.values())]
        labels = [row for row in labels if _plain(row[label]) == most[0]]
        if len(most) > 1 or not labels:
            return None
        value = labels[-1][label]
    people = ", ".join(row["person"] for row in labels)
    notes = " / ".join(row["note"] for row in labels if row.get("note"))
    return {**labels[-1], label: value, "person": people, "note": notes}


def _now(db: sqlite3.Connection, person: str) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    (before,) = db.execute("SELECT max(time) FROM labels WHERE person = ?", (person,)).fetchone()
    return max(now, before or now)


def _quoted(name: str) -> str:
    """A column's name in a query."""
    return '"' + name.replace('"', '""') + '"'


def _plain(cell: object) -> object:
    """A cell as SQLite can hold it."""
    return json.dumps(cell) if isinstance(cell, list | dict) else cell
