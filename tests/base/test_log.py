"""What people said is on the disk, and what counts of it. Review and service are killed in
`tests/torture/test_nothing_is_lost.py`."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from outcomes import sized

from bhpeft_pyro.base.log import Log, agreed, last
from bhpeft_pyro.data import table
from bhpeft_pyro.errors import DataError, WriteError

WRITER = """
import sys
from pathlib import Path
from bhpeft_pyro.base.log import Log
log = Log(Path(sys.argv[1]), ["text", "label"], ["note"])
for i in range(int(sys.argv[3])):
    row = {"text": "late " * 200, "label": "praise", "key": f"t{i}", "person": sys.argv[2]}
    log.add([row | {"round": "r1", "action": "label"}] * 2)
    print(i, flush=True)
"""


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "labels.db", ["text", "label"], ["note"])


def row(key: str, person: str, label: Any = "praise", **more: Any) -> dict[str, Any]:
    return {
        "text": f"text {key}",
        "label": label,
        "person": person,
        "round": "r1",
        "action": "skip" if label == "skip" else "none" if label is None else "label",
        "key": key,
        **more,
    }


def writing(path: Path, person: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), person, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_one_file_that_is_flushed_before_add_returns(log):
    log.add([row("t0", "Ana")])
    with log._opened("rw") as db:
        for name, value in (("synchronous", 3), ("journal_mode", "delete"), ("trusted_schema", 0)):
            assert db.execute(f"PRAGMA {name}").fetchone() == (value,)
    assert [*log.path.parent.iterdir()] == [log.path]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@sized(4, 100)
def test_killed_at_any_moment(runs, tmp_path):
    chance = random.Random(0)
    for number in range(runs):
        log = Log(tmp_path / f"{number}.db", ["text", "label"], ["note"])
        process = writing(log.path, "Ana", 10_000)
        assert process.stdout is not None
        confirmed = [process.stdout.readline()]
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        confirmed += process.stdout.readlines()
        process.wait()
        kept = [one["key"] for one in log.rows()]
        pairs = len(kept) // 2
        assert kept == [f"t{i}" for i in range(pairs) for _ in range(2)]  # whole calls
        whole = [line for line in confirmed if line.endswith("\n")]
        assert pairs >= len(whole) > 0
        log.add([row("next", "Bo")])
        with log._opened("rw") as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_processes_that_write_at_once(log):
    processes = [writing(log.path, who, 40) for who in ("Ana", "Bo")]
    assert [process.wait() for process in processes if process.communicate()] == [0, 0]
    people = [one["person"] for one in log.rows()]
    assert [people.count(who) for who in ("Ana", "Bo")] == [80, 80]


def test_what_cannot_be_written_is_an_error_and_nothing_is_added(log, monkeypatch):
    log.add([row("t0", "Ana")])
    before = log.rows()
    with monkeypatch.context() as patch:
        connect = sqlite3.connect

        def full(*given: Any, **how: Any) -> sqlite3.Connection:
            db = connect(*given, **how)
            db.execute("PRAGMA max_page_count=2")
            return db

        patch.setattr(sqlite3, "connect", full)
        with pytest.raises(WriteError, match="disk is full"):
            log.add([row("t1", "Ana", note="long" * 5000), row("t2", "Ana")])
    assert log.rows() == before
    folder = Log(log.path.parent, ["text", "label"])
    with pytest.raises(WriteError, match="unable to open"):
        folder.add([row("t1", "Ana")])
    log.path.write_bytes(b"no database" * 100)
    for use in (log.rows, lambda: log.add([row("t1", "Ana")])):
        with pytest.raises(WriteError, match="not a database"):
            use()


def test_the_last_decision_counts_and_undo_takes_it_back(log):
    for key, label in (("t0", "praise"), ("t0", "billing"), ("t1", "praise"), ("t0", "delivery")):
        log.add([row(key, "Ana", label)])
    log.add([row("t0", "Bo", "other")])
    labels = []
    for _ in range(4):
        labels.append(
            {one["key"]: one["label"] for one in last(log.rows()) if one["person"] == "Ana"}
        )
        log.undo("t0", "Ana")
    assert labels == [
        {"t1": "praise", "t0": "delivery"},
        {"t0": "billing", "t1": "praise"},
        {"t0": "praise", "t1": "praise"},
        {"t1": "praise"},
    ]
    assert [one["label"] for one in last(log.rows())] == ["praise", "other"]


def test_the_last_by_time_counts_whatever_comes_later(log):
    """An old import does not win, and neither does a clock that was set back."""
    log.add([row("t0", "Ana", "praise", time="2026-01-02T10:00:00.000Z")])
    log.add([row("t0", "Ana", "billing")])
    log.add([row("t0", "Ana", "delivery", time="2026-01-03T10:00:00.000Z")])
    assert [one["label"] for one in last(log.rows())] == ["billing"]
    log.undo("t0", "Ana")
    assert [one["label"] for one in last(log.rows())] == ["delivery"]
    log.add([row("t0", "Ana", "praise", time="2999-01-01T00:00:00.000+00:00")])
    log.add([row("t0", "Ana", "billing")])
    assert [one["label"] for one in last(log.rows())] == ["billing"]


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["a"], ["a"]),
        (["a", "b"], []),
        (["a", "b", "b"], ["b"]),
        (["a", None, None], []),
        (["a", "skip", "skip"], ["a"]),
        (["skip"], []),
        (['["a", "b"]', '["a", "b"]', "[]"], ['["a", "b"]']),
        ([0], [0]),
        ([2.0, 3.0], [2.5]),
        ([2.0, None, None], [2.0]),
        ([None], []),
    ],
)
def test_what_people_agree_on(votes, expected):
    rows = [row("t0", f"p{i}", vote) for i, vote in enumerate(votes)]
    assert [one["label"] for one in agreed(rows, "label")] == expected


def test_it_is_data_with_the_labels_that_people_agree_on(tmp_path):
    log = Log(tmp_path / "labels.sqlite", ["a review", "size", "stars"], ["note"])
    text = {"a review": "=good\nor not", "size": 3}
    log.add(
        [
            row("t0", "Ana", **text, stars=["a", "b"], note="odd"),
            row("t0", "Bo", **text, stars=["a", "b"], note="=so"),
            row("t0", "Cy", **text, stars=[]),
            row("t1", "Ana", **text, stars=["a"]),
            row("t1", "Ana", None, **text),
        ]
    )
    rows = table(str(log.path), ["a review"])
    ((number, one),) = rows.iterrows()
    assert number == 2 and rows.attrs == {"file": "labels.sqlite", "unit": "row"}
    assert {name: one[name] for name in ("a review", "size", "stars", "person", "note")} == {
        **text,
        "stars": '["a", "b"]',
        "person": "Ana, Bo",
        "note": "odd / =so",
    }


def test_files_that_are_no_log(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE labels (text, label)")
    (tmp_path / "none.db").write_text("text,label\n")
    for name in ("other.db", "none.db"):
        with pytest.raises(DataError, match=name):
            table(str(tmp_path / name))


@pytest.mark.parametrize("name", ["person", "Time", "note"])
def test_a_column_that_the_log_has_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"column '{name}'"):
        Log(tmp_path / "labels.db", ["text", name], ["note"])
