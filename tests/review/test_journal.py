"""The journal of labels: what is on the disk, and what counts of it. Its process is killed in
`tests/torture/test_nothing_is_lost.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pools import pool

from bhpeft_pyro.data import table
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.review import Decision, Journal, labelled
from bhpeft_pyro.review.journal import agreed

WRITER = """
import sys
from pathlib import Path
from bhpeft_pyro.review import Decision, Journal
journal = Journal(Path(sys.argv[1]))
for i in range(60):
    journal.add(Decision(f"t{i}", sys.argv[2], "label", "praise"))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.journal.jsonl"


def test_a_decision_is_flushed_to_the_disk_before_add_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    Journal(path).add(Decision("t0", "Ana", "label", "praise"))
    assert path.stat().st_size in synced


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_line_that_a_kill_has_cut_is_left_out_and_the_next_one_is_whole(path, cut):
    journal = Journal(path)
    for key in ("t0", "t1"):
        journal.add(Decision(key, "Ana", "label", "praise"))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1 + cut])
    again = Journal(path)
    assert again.texts == ["t0"]
    again.add(Decision("t2", "Ana", "label", "billing"))
    assert again.texts == Journal(path).texts == ["t0", "t2"]


def test_processes_that_write_at_once_do_not_overwrite_each_other(path):
    command = [sys.executable, "-c", WRITER, path]
    processes = [subprocess.Popen([*command, who]) for who in ("Ana", "Bo")]
    assert [process.wait() for process in processes] == [0, 0]
    journal = Journal(path)
    assert [len(journal.of_person(who)) for who in ("Ana", "Bo")] == [60, 60]
    assert len(path.read_text().splitlines()) == 120


def test_lines_that_somebody_removes_are_forgotten_and_new_ones_are_read(path):
    journal = Journal(path)
    for key in ("t0", "t1"):
        journal.add(Decision(key, "Ana", "label", "praise"))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    journal.add(Decision("t2", "Ana", "label", "billing"))  # the file is as long as before
    assert journal.texts == Journal(path).texts == ["t1", "t2"]
    assert journal.of_person("Ana") == Journal(path).of_person("Ana")


def test_what_another_process_wrote_is_read(path):
    mine, theirs = Journal(path), Journal(path)
    theirs.add(Decision("t0", "Bo", "label", "praise"))
    mine.refresh()
    assert mine.people == ["Bo"]
    mine.add(Decision("t1", "Ana", "skip"))
    assert [one.who for one in mine.of_text("t0")] == ["Bo"]


def test_the_last_decision_of_a_person_counts_and_undo_takes_it_back(path):
    journal = Journal(path)
    for action, label in (("label", "praise"), ("label", "billing")):
        journal.add(Decision("t0", "Ana", action, label))
    journal.add(Decision("t1", "Ana", "label", "praise"))
    journal.add(Decision("t0", "Ana", "label", "delivery"))
    assert [(one.key, one.label) for one in journal.of_person("Ana")] == [
        ("t0", "delivery"),
        ("t1", "praise"),
    ]
    labels = []
    for _ in range(4):  # each undo takes back one decision, the newest first
        last = journal.of_person("Ana")[0]
        journal.add(Decision(last.key, "Ana", "undo"))
        again = Journal(path)
        assert again.of_person("Ana") == journal.of_person("Ana")
        labels.append([one.label for one in again.of_text("t0")])
    assert labels == [["billing"], ["billing"], ["praise"], []]
    assert journal.texts == journal.people == []
    assert len(path.read_text().splitlines()) == 8  # nothing is removed


def test_the_last_by_time_counts_and_an_old_import_does_not_win(path):
    journal = Journal(path)
    journal.add(Decision("t0", "Ana", "label", "praise", at="2026-01-02T10:00:00.000Z"))
    assert journal.of_text("t0")[0].at == "2026-01-02T10:00:00.000Z"
    journal.add(Decision("t0", "Ana", "label", "billing"))
    journal.add(Decision("t0", "Ana", "label", "delivery", at="2026-01-03T10:00:00.000Z"))
    journal.add(Decision("t1", "Ana", "skip", at="2026-01-01T10:00:00.000Z"))
    made = journal.of_person("Ana")
    assert [(one.key, one.label) for one in made] == [("t0", "billing"), ("t1", None)]
    assert made[0].at > "2026-01-04"
    labels = []
    for _ in range(2):
        journal.add(Decision("t0", "Ana", "undo"))
        labels += [one.label for one in Journal(path).of_text("t0")]
    assert labels == ["delivery", "praise"]
    twice = [Decision("t0", "Bo", "label", label, at=at) for label, at in (("a", "2"), ("b", "1"))]
    assert [row["label"] for row in labelled(twice, pool())] == ["a"]


def test_a_decision_counts_though_the_clock_was_set_back(path):
    journal = Journal(path)
    for label, at in (("praise", "2999-01-01T00:00:00.000+00:00"), ("billing", "")):
        journal.add(Decision("t0", "Ana", "label", label, at=at))
    assert [one.label for one in Journal(path).of_text("t0")] == ["billing"]


@pytest.mark.parametrize(
    ("kind", "votes", "expected"),
    [
        ("class", ["a"], "a"),
        ("class", ["a", "b"], None),
        ("class", ["a", "b", "b"], "b"),
        ("class", ["a", None, None], None),
        ("labels", [["a", "b"], ["a", "b"], []], ["a", "b"]),
        ("labels", [[]], []),
        ("choice", [0], 0),
        ("rating", [2.0, 3.0], 2.5),
        ("rating", [None], None),
    ],
)
def test_what_people_agree_on(kind, votes, expected):
    made = [
        Decision("t0", f"p{i}", "none" if vote is None else "label", vote)
        for i, vote in enumerate(votes)
    ]
    assert agreed([*made, Decision("t0", "other", "skip")], kind) == expected


def test_the_table_has_the_rows_of_the_data_with_labels_and_notes(path, tmp_path):
    journal = Journal(path)
    journal.add(Decision("t3", "Ana", "label", "praise", note="=odd"))
    journal.add(Decision("t0", "Ana", "none"))
    journal.add(Decision("t1", "Ana", "skip"))
    journal.add(Decision("t3", "Bo", "label", "praise"))
    journal.add(Decision("t3", "Cy", "label", "other"))  # who did not give it
    journal.add(Decision("gone", "Bo", "label", "praise"))
    assert journal.write_table(tmp_path / "labels.csv", pool()) == 1
    (row,) = table(tmp_path / "labels.csv").to_dict("records")
    assert row == {
        "id": "03",
        "text": "text 3",
        "label": "praise",
        "labelled_by": "Ana, Bo",
        "note": "=odd",
    }


def test_a_journal_of_another_kind_is_refused(path):
    path.write_text(json.dumps({"key": "t0", "who": "Ana", "action": "burn"}) + "\n")
    with pytest.raises(DataError, match="action"):
        Journal(path)


GOOD = {"key": "t0", "who": "Ana", "action": "label", "label": "praise", "note": "", "at": "2026"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD | {"key": ["t0"]}, "key"),
        (GOOD | {"who": 7}, "who"),
        (GOOD | {"at": None}, "at"),
        (GOOD | {"at": 2026}, "at"),
        (GOOD | {"note": None}, "note"),
        (GOOD | {"lable": 1}, "is no decision: .*lable"),
        (GOOD | {"action": ["label"]}, "action"),
        ([], "is no decision"),
        ("", "is no decision"),
        ({"key": "t0"}, "is no decision: .*who"),
    ],
)
def test_a_line_that_was_altered_by_hand_is_named(path, line, message):
    """It was left out without a word, or ended the page with a traceback."""
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=f"labels.journal.jsonl, line 3.*{message}"):
        Journal(path)
    path.write_text(json.dumps(GOOD) + "\n")
    journal = Journal(path)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(GOOD | {"key": "t1"}) + "\n")
    for _ in range(2):  # nothing behind it is passed over
        with pytest.raises(DataError, match=f"line 2.*{message}"):
            journal.refresh()


def test_a_line_that_is_no_json_is_named(path):
    path.write_text(json.dumps(GOOD)[:-2] + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match=r"line 1, is no decision.*correct the line"):
        Journal(path)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("class", None),
        ("class", ["praise"]),
        ("class", {}),
        ("choice", [0]),
        ("labels", "praise"),
        ("labels", [["praise"]]),
        ("rating", "good"),
        ("rating", None),
        ("rating", float("nan")),
        ("rating", [3]),
    ],
)
def test_a_label_that_was_altered_by_hand_is_named(path, kind, label):
    path.write_text(json.dumps(GOOD | {"label": label}) + "\n")
    with pytest.raises(DataError, match="label of 'Ana' for the text 't0'"):
        labelled(Journal(path).of_text("t0"), pool(kind=kind))
