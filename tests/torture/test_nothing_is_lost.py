"""What was saved, learnt or labelled is there after a kill, on a full disk and beside another
process: the old state or the new one, readable, and the next writer leaves nothing else behind.

The small runs are in the suite; for the large ones, with their counts:

    python -m pytest -m torture -s tests/torture/test_nothing_is_lost.py
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import pytest
from components import equal, same
from forks import in_a_child, killed_at_line, lines_of, start, wait
from outcomes import BACKBONE, ERROR, OLD, RIGHT, TOKENIZER, load, report, sized
from pools import pool, session_in
from saves import backbone_in
from services import network_in

import bhpeft_pyro as bh
from bhpeft_pyro.base.log import Log
from bhpeft_pyro.data.table import table as read_table
from bhpeft_pyro.errors import BHPEFTError, BusyError
from bhpeft_pyro.posterior.saving import FILE
from bhpeft_pyro.serving import feedback
from bhpeft_pyro.serving.requests import Refused
from bhpeft_pyro.serving.rounds import Served, Source
from bhpeft_pyro.streams import History
from bhpeft_pyro.testing import tiny_examples, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

QUICK: dict[str, Any] = {"max_steps": 1, "progress": False}
WEEKS = {f"week {i}": tiny_examples(8, seed=i) for i in range(3)}
LABELS = 3  # that are given in a run


@cache
def posteriors() -> tuple[bh.Posterior, bh.Posterior]:
    """Two that differ, the second a round later."""
    model = tiny_model((bh.peft.LoRA(rank=1),), outputs=20)
    first = bh.fit(model, "normal", tiny_examples(), **QUICK)
    return first, first.update(tiny_examples(12, seed=1))


def which(loaded: bh.Posterior) -> str:
    """Which one was loaded, whole."""
    old, new = posteriors()
    for name, posterior in ((OLD, old), (RIGHT, new)):
        if len(loaded.lineage) == len(posterior.lineage) and same(loaded, posterior):
            return name
    raise AssertionError("what was loaded is none of those that were saved")


# What writes: each begins in a folder, and may be called again after it was killed


def nothing(folder: Path) -> None:
    folder.mkdir()


def save_old(folder: Path) -> None:
    posteriors()[0].save(folder, overwrite=True)


def save_new(folder: Path) -> None:
    posteriors()[1].save(folder, overwrite=True)


def update(folder: Path) -> None:
    saved = load(folder)
    if len(saved.lineage) == 1:
        saved = saved.update(tiny_examples(12, seed=1))
    saved.save(folder, overwrite=True)


def saved_in(folder: Path) -> str:
    return which(load(folder)) if (folder / FILE).exists() else OLD


def stream(folder: Path) -> bh.Posterior:
    return bh.stream(tiny_model(()), WEEKS, folder, guide="normal", **QUICK)


@cache
def weights() -> Any:
    """What the stream ends in when nobody disturbs it."""
    with TemporaryDirectory() as folder:
        return stream(Path(folder) / "run").guide.state_dict()


def rounds_in(folder: Path) -> str:
    """The rounds there are those of the first batches, in a single line."""
    history = History(folder / "rounds")
    assert len(history.leaves) <= 1
    rounds = [(each.name, each.data) for each in history.rounds.values()]
    assert rounds == [(name, week.fingerprint) for name, week in WEEKS.items()][: len(rounds)]
    if len(rounds) < len(WEEKS):
        return OLD
    last = history.load(history.leaves[0], BACKBONE, tokenizer=TOKENIZER)
    assert equal(last.guide.state_dict(), weights())
    return RIGHT


def said(folder: Path) -> Path:
    """A file beside the folder, with what people were told to be kept."""
    return folder.with_name("confirmed")


def label(folder: Path) -> None:
    session = session_in(folder, pool(200))
    with said(folder).open("ab", buffering=0) as confirmed:
        for _ in range(LABELS):
            key = session.next_for("Ana")
            assert key is not None
            session.decide("Ana", key, "label", ["1"], note="")
            confirmed.write(f"{key}\n".encode())


def labels_in(folder: Path) -> str:
    kept = [one.key for one in session_in(folder, pool(200)).snapshot().decisions]
    confirmed = said(folder).read_text().split()
    assert {*kept} >= {*confirmed}
    if kept:
        table = read_table(str(folder / "labels.db"))
        assert [*table["text"]] == [f"text {key[1:]}" for key in kept]
    return RIGHT if len(confirmed) >= LABELS else OLD


@cache
def served() -> Served:
    root = Path(mkdtemp())
    backbone_in(root / "tiny")
    columns = bh.Columns(label_names=["bad", "good"])
    model = bh.Model(network_in(root, (), 2))
    rows = {"text": [*tiny_examples(20).texts], "label": ["bad", "good"] * 10}
    bh.fit(model, "normal", rows, columns=columns, **QUICK).save(root / "runs" / "april")
    return Source(root / "runs", device="cpu").load("april")


def give_feedback(folder: Path) -> None:
    here = replace(served(), folder=folder)
    labels = feedback.Feedback(16_384)
    with said(folder).open("ab+", buffering=0) as confirmed:
        confirmed.seek(0)
        number = len(confirmed.read().split())
        for by in map(str, range(number, number + LABELS)):
            labels.take(here, feedback.read({"text": "w5", "label": "bad", "by": by}, here))
            confirmed.write(f"{by}\n".encode())


def feedback_in(folder: Path) -> str:
    confirmed = said(folder).read_text().split()
    kept = [row["person"] for row in Log(folder / feedback.FILE).rows()]
    # One that was kept, and not said before the end, comes again.
    assert [*dict.fromkeys(kept)][: len(confirmed)] == confirmed
    tally = feedback.Tally.of(folder, served().id)
    assert len(kept) == (0 if tally is None else tally.labels)
    return RIGHT if len(confirmed) >= LABELS else OLD


class Act(NamedTuple):
    """Something that writes into a folder."""

    begin: Callable[[Path], object]  # makes what is there before
    work: Callable[[Path], object]
    state: Callable[[Path], str]  # OLD or RIGHT; fails if it is neither
    size: int  # bytes; a tenth of what the largest file takes, about


ACTS = {
    "first save": Act(nothing, save_new, saved_in, 1000),
    "second save": Act(save_old, save_new, saved_in, 1000),
    "update": Act(save_old, update, saved_in, 1000),
    "stream": Act(nothing, stream, rounds_in, 2000),
    "review": Act(nothing, label, labels_in, 400),
    "feedback": Act(nothing, give_feedback, feedback_in, 400),
}
EACH = pytest.mark.parametrize("act", ACTS.values(), ids=[*ACTS])


def begin(act: Act, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    said(folder).write_bytes(b"")
    act.begin(folder)


def check_next(act: Act, folder: Path) -> None:
    """The next writer ends well, and what was left is gone."""
    act.work(folder)
    assert act.state(folder) == RIGHT
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


@EACH
@sized(7, 100)
def test_killed_before_a_line(runs: int, act: Act, tmp_path: Path) -> None:
    """At up to `runs` of the lines that write, from the first to the last."""
    folder, counts = tmp_path / "run", Counter[str]()
    begin(act, folder)
    act.state(folder)  # so that what it needs is made once, here
    lines = lines_of(lambda: act.work(folder), tmp_path / "lines")
    assert lines > 30
    for line in sorted({1 + (lines - 1) * i // (runs - 1) for i in range(runs)}):
        begin(act, folder)
        assert killed_at_line(line, lambda: act.work(folder))
        counts[act.state(folder)] += 1
        check_next(act, folder)
    report(f"killed before a line of {lines}", counts)


# A full disk: no file may grow, or the n-th call that makes, opens or renames one fails


@contextmanager
def short_files(_folder: Path, size: int, number: int) -> Iterator[None]:
    """No file has more than a few bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * number, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


LEFT = [0]  # calls until one fails


@contextmanager
def failing_call(folder: Path, _size: int, number: int) -> Iterator[None]:
    """The n-th call that needs room in the folder fails."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.mkdir")
        log = event == "sqlite3.connect" and f"{folder}/" in str(args[0])
        writes |= event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if log or (writes and str(args[0]).startswith(str(folder))):
            LEFT[0] -= 1
            if LEFT[0] == 0 and log:
                raise sqlite3.OperationalError("database or disk is full")
            if LEFT[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not LEFT[0]:  # hooks cannot be removed
        sys.addaudithook(hook)
    LEFT[0] = number
    try:
        yield
    finally:
        LEFT[0] = -1


@EACH
@pytest.mark.parametrize("shortage", [short_files, failing_call])
@sized(6, 60)
def test_a_full_disk(
    runs: int,
    act: Act,
    shortage: Callable[[Path, int, int], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    begin(act, folder)
    act.state(folder)  # so that what it needs is made once, with room for it

    def attempt(number: int) -> str:
        begin(act, folder)
        ending = RIGHT
        try:
            with shortage(folder, act.size, number):
                act.work(folder)
        except (BHPEFTError, Refused) as error:
            assert isinstance(error, OSError) or getattr(error, "status", 0) == 503
            ending = ERROR
        assert act.state(folder) == RIGHT or ending == ERROR
        check_next(act, folder)
        return ending

    def attempts() -> Counter[str]:
        numbers = {round(60 ** (i / runs)) for i in range(runs + 1)}
        return Counter(attempt(number) for number in (*sorted(numbers), 10_000))

    counts = in_a_child(attempts, tmp_path / "counts")
    report(f"with {shortage.__name__}", Counter(counts))
    assert counts[ERROR] and counts[RIGHT]


# Two at once


@sized(10, 300)
def test_two_write_and_two_read(runs: int, tmp_path: Path) -> None:
    """A writer waits for the other; a reader sees one of both."""
    folder = tmp_path / "run"
    save_old(folder)

    def writes(save: Callable[[Path], None]) -> list[str]:
        return [save(folder) or RIGHT for _ in range(runs)]

    def reads() -> list[str]:
        return [which(load(folder)) for _ in range(runs)]

    work = [lambda: writes(save_old), lambda: writes(save_new), reads, reads]
    results = [tmp_path / str(number) for number in range(len(work))]
    children = [start(each, result) for each, result in zip(work, results, strict=True)]
    assert [wait(child) for child in children] == [0] * len(work)
    for what, some in (("two write", results[:2]), ("two read", results[2:])):
        report(what, Counter(x for result in some for x in json.loads(result.read_text())))
    assert [path.name for path in folder.iterdir()] == [FILE]


@sized(3, 100)
def test_two_streams_in_one_folder_make_a_single_line(runs: int, tmp_path: Path) -> None:
    counts = Counter[str]()

    def run(folder: Path) -> str:
        try:
            stream(folder)
        except BusyError as error:
            assert "another process is writing into" in str(error)
            return "refused"
        return RIGHT

    for number in range(runs):
        folder, results = tmp_path / str(number), [tmp_path / name for name in "ab"]
        children = [start(lambda folder=folder: run(folder), result) for result in results]  # type: ignore[misc]
        assert [wait(child) for child in children] == [0, 0]
        ends = [json.loads(result.read_text()) for result in results]
        counts.update(ends)
        assert RIGHT in ends and rounds_in(folder) == RIGHT
    report("two streams", counts, "refused")
