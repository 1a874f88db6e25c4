"""Folders of users, and folders from elsewhere: what this package did not write stays as it is, and
what a killed process left is removed by the next.

    python -m pytest -m torture -s tests/torture/test_folders.py
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forks import killed_at_line, start, wait
from outcomes import ERROR, OLD, RIGHT, report, sized
from safetensors.torch import load as load_tensors

import bhpeft_pyro as bh
from bhpeft_pyro.base import files
from bhpeft_pyro.errors import WriteError
from bhpeft_pyro.streams import History
from bhpeft_pyro.testing import tiny_classifier, tiny_examples, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

QUICK: dict[str, Any] = {"max_steps": 1, "progress": False}
WEEKS = {f"week {i}": tiny_examples(8, seed=i) for i in range(2)}
PASSWORDS = "the user's own"


def content(folder: Path) -> dict[str, Any]:
    """All files below a folder; of tensors the values, as their header is in any order."""
    found = {}
    for path in (each for each in folder.rglob("*") if each.is_file()):
        data: Any = path.read_bytes()
        if path.name == "adapter_model.safetensors":
            data = {name: value.tolist() for name, value in load_tensors(data).items()}
        found[str(path.relative_to(folder))] = data
    return found


@sized(8, 1)
def test_an_export_is_killed_before_each_line(runs: int, tmp_path: Path) -> None:
    """`runs` is the distance of the lines. Two adapters become one, of another rank."""
    pytest.importorskip("peft")
    old, new = (
        bh.fit(
            bh.Model(
                bh.RandomPEFT(
                    tiny_classifier(),
                    bh.presets.lora(rank=rank),
                    bh.ClassifierHead(2),
                    tiny_tokenizer(),
                )
            ),
            "normal",
            tiny_examples(),
            components=3 - rank,
            **QUICK,
        )
        for rank in (1, 2)
    )
    folder, before = tmp_path / "export" / "run", tmp_path / "export" / ".run.before"
    expected = [content(each.to_peft(tmp_path / str(i))) for i, each in enumerate((old, new))]
    counts, line = Counter[str](), 1
    while True:
        shutil.rmtree(folder.parent, ignore_errors=True)
        old.to_peft(folder)
        killed = killed_at_line(line, lambda: new.to_peft(folder, overwrite=True))
        found = content(folder if folder.exists() else before)
        assert found in expected and (killed or found == expected[1])
        counts[(OLD, RIGHT)[expected.index(found)]] += 1
        new.to_peft(folder, overwrite=True)
        assert content(folder) == expected[1]
        assert [path.name for path in folder.parent.iterdir()] == ["run"]
        if not killed:
            break
        line += runs
    assert line > 30
    report("killed before a line of an export", counts)


@sized(10, 1000)
def test_a_file_is_killed_at_random_moments(runs: int, tmp_path: Path) -> None:
    """The next writer of the same name removes what is left, but nothing of one that goes on."""
    file, counts = tmp_path / "rows.csv", Counter[str]()

    def writes(begin: int) -> None:
        while True:
            files.write(file, bytes([begin]) * 10**6)

    files.write(file, b"\0" * 10**6)
    for number in range(runs):
        children = [start(lambda i=i: writes(i)) for i in (1, 2)]  # type: ignore[misc]
        time.sleep(0.001 * (number % 20))
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert [wait(child) for child in children] == [-signal.SIGKILL] * 2
        whole = file.read_bytes()
        assert len(whole) == 10**6 == whole.count(whole[0])
        with files.writing(file) as goes_on:
            goes_on.write(whole)
            files.write(file, whole)
            assert len([*tmp_path.iterdir()]) == 2, "the leftovers are gone, a writer's file is not"
        assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
        counts[RIGHT] += 1
    report("killed while writing a file", counts)


def adds(run: Path) -> object:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    return History(run / "rounds").add(posterior)


def keeps(run: Path) -> object:
    history = History(run / "rounds")
    return history.keep_only(next(iter(history.rounds)))


def continues(run: Path) -> object:
    weeks = {**WEEKS, "week 2": tiny_examples(8, seed=2)}
    return bh.stream(tiny_model(()), weeks, run, guide="normal", **QUICK)


def saves(run: Path) -> object:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    return posterior.save_pretrained(run, overwrite=True)


LINKS = ("rounds/.lock", "rounds/.writer", "record.json", "record.csv", "README.md")
LINKS += ("posterior.safetensors", ".posterior.lock")
FOLDERS = ("rounds", "rounds/aside", "rounds/0123456789ab")


@pytest.mark.parametrize("use", [adds, keeps, continues, saves])
def test_nothing_is_written_through_a_link(use: Callable[[Path], object], tmp_path: Path) -> None:
    """A folder from elsewhere may hold links to any file of its user."""
    run, home, counts = tmp_path / "run", tmp_path / "home", Counter[str]()
    home.mkdir()
    for name in (*LINKS, *FOLDERS):
        shutil.rmtree(run, ignore_errors=True)
        bh.stream(tiny_model(()), WEEKS, run, guide="normal", **QUICK)
        link, goal = run / name, home / Path(name).name
        if name == "rounds":
            link.rename(goal)
        elif name in FOLDERS:
            goal.mkdir()
            (goal / "passwords").write_text(PASSWORDS)
        else:
            goal.write_text(PASSWORDS)
            link.unlink(missing_ok=True)
        link.symlink_to(goal)
        before = content(home)
        try:
            use(run)
            counts[RIGHT] += 1
        except WriteError as error:
            assert "symbolic link" in str(error)
            counts[ERROR] += 1
        assert content(home) == before
        with suppress(FileNotFoundError):
            shutil.rmtree(home)
        home.mkdir()
    report(f"a link, and a program that {use.__name__}", counts)
