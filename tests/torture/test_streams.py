"""Streams that are killed at any moment, and two in one folder: a single line of right rounds.

Each runs in a process that is forked from this one, so that nothing is imported again. After each
the folder holds the rounds of the first batches, whole, and the next run continues them. Counts by
outcome are printed.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BusyError
from bhpeft_pyro.testing import tiny_examples, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

WEEKS = {f"week {i}": tiny_examples(8, seed=i) for i in range(3)}
OUTCOMES = ("finished", "hung", "refused", "wrong answer", "error")  # by exit code
HUNG = 60  # seconds
SECONDS = 1.0  # a timer kills within
CALLS = 61  # to files, at one of which a process is killed; a whole run has as many

small_and_large = pytest.mark.parametrize(
    "trials", [3, pytest.param(300, marks=pytest.mark.torture)]
)


def run(folder: Path) -> bh.Posterior:
    options: dict[str, Any] = {"max_steps": 1, "progress": False}
    return bh.stream(tiny_model(()), WEEKS, folder, guide="normal", **options)


def facts(posterior: bh.Posterior) -> list[torch.Tensor]:
    nll = [report.metrics.get("nll", 0.0) for report in posterior.lineage]
    return [*posterior.guide.state_dict().values(), torch.tensor(nll)]


@cache
def expected(folder: Path) -> list[torch.Tensor]:
    return facts(run(folder))


def start(folder: Path, right: list[torch.Tensor], die: Callable[[], object] | None) -> int:
    """A process that runs the stream from the same moment on as others that are started now."""
    moment = time.monotonic() + 0.02
    if pid := os.fork():
        return pid
    code = OUTCOMES.index("error")
    try:
        faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__)  # 1
        time.sleep(max(0.0, moment - time.monotonic()))
        if die is not None:
            die()
        same = all(torch.equal(*pair) for pair in zip(facts(run(folder)), right, strict=True))
        code = OUTCOMES.index("finished" if same else "wrong answer")
    except BusyError as error:
        code = OUTCOMES.index("refused" if " is writing into " in str(error) else "error")
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def outcome(pid: int) -> str:
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) else OUTCOMES[os.WEXITSTATUS(status)]


def at_a_moment(seconds: float) -> Callable[[], object]:
    def die() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # at once, without any cleaning up
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return die


def at_a_file(folder: Path, number: int) -> Callable[[], object]:
    """Just before the n-th time that a file there is opened, renamed, made or removed."""
    left = [number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(
            args[0]
        ).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def fate(chance: random.Random, folder: Path) -> Callable[[], object]:
    if chance.random() < 0.3:
        return at_a_moment(chance.uniform(0.001, SECONDS))
    return at_a_file(folder, chance.randint(1, CALLS))


def check_rounds(folder: Path) -> int:
    """The rounds there are those of the first batches; returns how many."""
    history = bh.sequential.History(folder / "rounds")
    assert len(history.leaves) <= 1
    rounds = list(history.rounds.values())
    assert [(each.name, each.data) for each in rounds] == [
        (name, week.fingerprint) for name, week in WEEKS.items()
    ][: len(rounds)]
    return len(rounds)


def check_whole(folder: Path, right: list[torch.Tensor]) -> None:
    """Another run ends well, and nothing of the killed ones is left."""
    assert outcome(start(folder, right, None)) == "finished"
    assert check_rounds(folder) == len(WEEKS)
    names = {path.name for path in folder.iterdir()} | {
        path.name for path in (folder / "rounds").iterdir() if path.is_file() or "." in path.name
    }
    assert names == {"rounds", "record.json", "record.csv", ".lock"}


@small_and_large
def test_a_stream_killed_at_any_moment_continues(
    tmp_path: Path, trials: int, capsys: pytest.CaptureFixture[str]
) -> None:
    right, counts = expected(tmp_path / "whole"), Counter[str]()
    for trial in range(trials):
        chance, folder = random.Random(trial), tmp_path / str(trial)
        for _ in range(4):
            found = outcome(start(folder, right, fate(chance, folder)))
            rounds = check_rounds(folder)
            counts[f"{found} with {rounds} rounds"] += 1
            assert found == "killed" or (found, rounds) == ("finished", len(WEEKS))
        check_whole(folder, right)
    show("killed and started again", counts, capsys)


@small_and_large
def test_two_streams_in_one_folder_make_a_single_line(
    tmp_path: Path, trials: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of them are killed, too."""
    right, counts = expected(tmp_path / "whole"), Counter[str]()
    for trial in range(trials):
        chance, folder = random.Random(trial), tmp_path / str(trial)
        fates = [fate(chance, folder) if chance.random() < 0.2 else None for _ in range(2)]
        found = sorted(outcome(pid) for pid in [start(folder, right, each) for each in fates])
        counts[", ".join(found)] += 1
        assert set(found) <= {"finished", "refused", "killed"} and set(found) != {"refused"}
        check_rounds(folder)
        check_whole(folder, right)
    show("two at once", counts, capsys)


def show(title: str, counts: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(
            f"\n{title}:",
            *(f"{number:6} {what}" for what, number in counts.most_common()),
            sep="\n",
        )
