"""An update in another process: what it learns, and what the page is told."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program import bhpeft, loaded, write_csv
from saves import backbone_in
from services import until

from bhpeft_pyro.errors import BusyError, ConfigError, WriteError
from bhpeft_pyro.review import Learning, Pool, Session, State, Where
from bhpeft_pyro.review import learning as module

TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(20)]
NEW = [f"w{5 + i % 2} w{12 + i} w9 w{30 - i}" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learning")
    backbone_in(root / "tiny")
    names = ["good" if i % 2 else "bad" for i in range(20)]
    write_csv(root / "train.csv", text=TEXTS, label=names)
    write_csv(root / "new.csv", text=NEW)
    quick = ("--max-steps", 4, "--components", 2, "--keep-texts", "--device", "cpu")
    fit = ("fit", root / "train.csv", "--backbone", root / "tiny", *quick)
    bhpeft(*fit, "--out", root / "run")
    return root


def session_in(folder: Path, tmp_path: Path) -> tuple[Session, Where]:
    where = Where(folder / "run", tmp_path / "next", str(folder / "new.csv"), tmp_path / "l.db")
    pool = Pool.of(loaded(where.run, folder), where.data)
    return Session(pool, where.labels), where


def ended(learning: Learning) -> State:
    """The state once the update has ended."""
    until(lambda: not learning.state.running, 300)
    return learning.state


class Watched(Learning):
    """Keeps each state, however short it lasted."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "state":
            self.__dict__.setdefault("states", []).append(value)
        super().__setattr__(name, value)


def test_labels_are_learnt_and_the_queue_is_made_anew(folder, tmp_path):
    session, where = session_in(folder, tmp_path)
    learning = Watched(where, session.take)
    for _ in range(4):
        key = session.next_for("Ana")
        assert key is not None
        session.decide("Ana", key, "label", ["0"], "")
    learning.start()
    with pytest.raises(BusyError, match="one is running"):
        learning.start()
    state = ended(learning)
    assert state.labels == 4, state.words
    shares = [state.share for state in learning.states]
    assert shares == sorted(shares) and len({*shares} - {0.0, 1.0}) > 4  # the bar moves
    assert "Round 2 has learnt 4 labels" in learning.state.words
    learnt = loaded(where.out, folder)
    assert f"changed {learnt.report.changed} of 20 answers to texts" in learning.state.words
    assert session.pool.round == learnt.report.id and session.pool.number == 2
    assert not {one.key for one in session.recent("Ana")} & {*session.pool.order}
    assert session.pool == Pool.of(learnt, where.data)

    # Once more, with a label changed: again from the first round, and each label once.
    session.decide("Ana", session.recent("Ana")[0].key, "label", ["1"], "")
    session.decide("Ana", session.next_for("Ana") or "", "label", ["0"], "")
    learning.start()
    ended(learning)
    again = loaded(where.out, folder)
    assert [report.examples for report in again.lineage] == [20, 5]
    bhpeft("update", where.run, where.labels, "--out", tmp_path / "by-hand", "--device", "cpu")
    by_hand = loaded(tmp_path / "by-hand", folder)
    assert by_hand.report.data == again.report.data

    # No other round is replaced: one of other labels, of another folder, or of no page.
    assert (newer := where.newer()) is not None and newer.id == again.report.id
    for changed in (
        {"labels": tmp_path / "l2.db"},
        {"labels": tmp_path / "other" / "l.db"},
        {"out": tmp_path / "by-hand"},
        {"run": tmp_path / "by-hand"},
    ):
        with pytest.raises(ConfigError, match=r"--new-round: .* is no round of .* with the labels"):
            replace(where, **changed).newer()


@pytest.mark.parametrize(("out", "words"), [("next", "l.db"), ("run", "--new-round: ")])
def test_a_failure_is_told_and_the_page_goes_on(folder, tmp_path, out, words):
    session, where = session_in(folder, tmp_path)
    where = replace(where, out=where.run if out == "run" else where.out)
    learning = Learning(where, session.take)
    before = session.pool
    learning.start()  # there is no table
    state = ended(learning)
    assert "The update failed: " in state.words and words in state.words and not state.running
    assert session.pool is before and not (tmp_path / "next").exists()


def _cut(there: Any, where: Where) -> None:
    os.write(there.fileno(), b"\0\0\1\0half")
    os._exit(1)


def _ended(there: Any, where: Where) -> None:
    there.send({"pool": None, "labels": 1, "words": "Round 2."})
    there.close()


def _broken(there: Any, where: Where) -> None:
    del module.Posterior.load  # no error of this package
    module._learn(there, where)


@pytest.mark.parametrize(
    ("learn", "words"),
    [
        (_cut, "without a message; it may have run out of memory"),
        (_ended, "The update failed: no space"),
        (_broken, "The update failed: AttributeError: "),
    ],
)
def test_an_update_ends_whatever_happens_to_it(folder, tmp_path, monkeypatch, learn, words):
    def take(pool: object) -> None:
        raise WriteError("no space")

    where = Where(folder / "run", tmp_path / "next", "new.csv", tmp_path / "l.db")
    learning = Learning(where, take)
    monkeypatch.setattr(module, "_learn", learn)
    learning.start()
    state = ended(learning)
    assert words in state.words and not state.running


def test_an_update_that_cannot_begin_ends(folder, tmp_path, monkeypatch):
    def refused(self: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refused)
    where = Where(folder / "run", tmp_path / "next", "new.csv", tmp_path / "l.db")
    learning = Learning(where, print)
    for _ in range(2):
        learning.start()
        assert not ended(learning).running
