"""Streams that are killed at any moment, and two in one folder: a single line of right rounds.

Each runs in a process that is forked from this one, so that nothing is imported again. After each
the folder holds the rounds of the first batches, whole, and the next run continues them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_a_child, start, wait
from outcomes import report, sized

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BusyError
from bhpeft_pyro.testing import tiny_examples, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

WEEKS = {f"week {i}": tiny_examples(8, seed=i) for i in range(3)}
Die = Callable[[], object]
"""What a process does first, so that it is killed later."""
NUMBERS = count()
HUNG = 60  # seconds
SECONDS = 1.0  # a timer kills within
CALLS = 65  # to files, at one of which a process is killed; a whole run has about as many


def run(folder: Path) -> bh.Posterior:
    options: dict[str, Any] = {"max_steps": 1, "progress": False}
    return bh.stream(tiny_model(()), WEEKS, folder, guide="normal", **options)


def facts(posterior: bh.Posterior) -> list[torch.Tensor]:
    nll = [report.metrics.get("nll", 0.0) for report in posterior.lineage]
    return [*posterior.guide.state_dict().values(), torch.tensor(nll)]


@cache
def expected(folder: Path) -> list[torch.Tensor]:
    return facts(run(folder))


def started(folder: Path, right: list[torch.Tensor], die: Die | None) -> tuple[int, Path]:
    """A process that runs the stream from the same moment on as others that are started now, and
    the file of its outcome."""
    moment = time.monotonic() + 0.02

    def work() -> str:
        faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__)
        time.sleep(max(0.0, moment - time.monotonic()))
        if die is not None:
            die()
        try:
            found = facts(run(folder))
        except BusyError as error:
            assert " is writing into " in str(error)
            return "refused"
        return "finished" if all(map(torch.equal, found, right)) else "wrong answer"

    result = folder.with_name(f"outcome {next(NUMBERS)}.json")
    return start(work, result), result


def outcome(process: tuple[int, Path]) -> str:
    child, result = process
    code = wait(child)
    return "killed" if code < 0 else "error" if code else json.loads(result.read_text())


def at_a_moment(seconds: float) -> Die:
    def die() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # at once, without any cleaning up
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return die


def at_a_file(folder: Path, number: int) -> Die:
    """Just before the n-th time that a file there is opened, renamed, made or removed."""
    left = [number]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_every_file(folder, die)


def at_every_file(folder: Path, act: Die) -> None:
    events = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in events and str(args[0]).startswith(str(folder)):
            act()

    sys.addaudithook(hook)


def calls_of(folder: Path) -> int:
    """How many calls to files a whole run has."""

    def work() -> int:
        calls: list[int] = []
        at_every_file(folder, lambda: calls.append(1))
        run(folder)
        return len(calls)

    number: int = in_a_child(work, folder.with_name("calls"))
    return number


def fate(chance: random.Random, folder: Path) -> Die:
    if chance.random() < 0.3:
        return at_a_moment(chance.uniform(0.001, SECONDS))
    return at_a_file(folder, chance.randint(1, CALLS))


def check_rounds(folder: Path) -> int:
    """The rounds there are those of the first batches; returns how many."""
    history = bh.streams.History(folder / "rounds")
    assert len(history.leaves) <= 1
    rounds = list(history.rounds.values())
    assert [(each.name, each.data) for each in rounds] == [
        (name, week.fingerprint) for name, week in WEEKS.items()
    ][: len(rounds)]
    return len(rounds)


def check_whole(folder: Path, right: list[torch.Tensor]) -> None:
    """Another run ends well, and nothing of the killed ones is left."""
    assert outcome(started(folder, right, None)) == "finished"
    assert check_rounds(folder) == len(WEEKS)
    names = {path.name for path in folder.iterdir()} | {
        path.name for path in (folder / "rounds").iterdir() if path.is_file() or "." in path.name
    }
    assert names == {"rounds", "record.json", "record.csv", ".lock"}


def test_a_stream_killed_at_a_file_continues(tmp_path: Path) -> None:
    right, killed = expected(tmp_path / "whole"), set()
    calls = calls_of(tmp_path / "not killed")
    for number in (*range(1, calls, 6), calls):
        folder = tmp_path / str(number)
        assert outcome(started(folder, right, at_a_file(folder, number))) == "killed"
        killed.add(check_rounds(folder))
        check_whole(folder, right)
    assert killed == {0, 1, 2, 3}  # after each number of rounds


@pytest.mark.torture
def test_a_stream_killed_at_any_moment_continues(tmp_path: Path) -> None:
    right, counts = expected(tmp_path / "whole"), Counter[str]()
    for trial in range(300):
        chance, folder = random.Random(trial), tmp_path / str(trial)
        for _ in range(4):
            found = outcome(started(folder, right, fate(chance, folder)))
            rounds = check_rounds(folder)
            counts[f"{found} with {rounds} rounds"] += 1
            assert found == "killed" or (found, rounds) == ("finished", len(WEEKS))
        check_whole(folder, right)
    report("killed and started again", counts, *counts)


@sized(3, 300)
def test_two_streams_in_one_folder_make_a_single_line(tmp_path: Path, runs: int) -> None:
    """Some of them are killed, too."""
    right, counts = expected(tmp_path / "whole"), Counter[str]()
    for trial in range(runs):
        chance, folder = random.Random(trial), tmp_path / str(trial)
        fates = [fate(chance, folder) if chance.random() < 0.2 else None for _ in range(2)]
        found = sorted(outcome(pid) for pid in [started(folder, right, each) for each in fates])
        counts[", ".join(found)] += 1
        assert set(found) <= {"finished", "refused", "killed"} and set(found) != {"refused"}
        check_rounds(folder)
        check_whole(folder, right)
    report("two at once", counts, *counts)
