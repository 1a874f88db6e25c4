"""Too little disk, too little memory: a right answer, or an own error with all as it was.

A disk runs short in three ways: no file may grow beyond some bytes; the n-th call that makes,
opens or renames a file fails; a file system of a few MB fills up. The last needs the right to
mount one.

    python -m pytest -m torture -s tests/torture/test_shortage.py
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from components import same
from forks import in_a_child, start, wait
from outcomes import ERROR, OLD, RIGHT, load, report, sized

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError, WriteError, is_out_of_memory
from bhpeft_pyro.posterior.saving import FILE
from bhpeft_pyro.streams import History
from bhpeft_pyro.testing import tiny_examples, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

WEEKS = {f"week {i}": tiny_examples(8, seed=i) for i in range(3)}
ENDED = "process ended"

Shortage = Callable[[Path, int], AbstractContextManager[None]]


# Each within a child process; `size` says how little there is


@contextmanager
def short_files(_folder: Path, size: int) -> Iterator[None]:
    """No file has more than `size` kB."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2**10, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


LEFT = [0]  # calls until one fails


@contextmanager
def failing_call(folder: Path, size: int) -> Iterator[None]:
    """The call of number `size` that needs room in the folder fails."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir") and str(args[0]).startswith(str(folder)):
            LEFT[0] -= 1
            if LEFT[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not LEFT[0]:  # hooks cannot be removed
        sys.addaudithook(hook)
    LEFT[0] = size
    yield
    LEFT[0] = -1


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """All but `size` blocks of the file system are taken."""
    disk, ballast = os.statvfs(folder), folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (disk.f_bavail - size) * disk.f_bsize)
    try:
        yield
    finally:
        ballast.unlink()


def mounted(folder: Path) -> bool:
    """Mount a file system that this process alone sees, if it may."""
    maps = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    new_user, new_mounts = 0x10000000, 0x00020000
    if not sys.platform.startswith("linux") or ctypes.CDLL(None).unshare(new_user | new_mounts):
        return False
    for name, text in maps.items():
        Path("/proc/self", name).write_text(text)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def check(
    what: str,
    shortage: Shortage,
    folder: Path,
    sizes: Iterable[int],
    attempt: Callable[[Shortage, int], str],
) -> None:
    """Ever more of what is short, at last enough: both an error and the right answer come out."""

    def attempts() -> Counter[str] | None:
        folder.mkdir()
        if shortage is small_disk and not mounted(folder):
            return None
        return Counter(attempt(shortage, size) for size in (*sizes, 500))

    counts = in_a_child(attempts, folder.with_name("counts"))
    if counts is None:
        pytest.skip("no file system may be mounted here")
    report(f"{what}, {shortage.__name__}", Counter(counts))
    assert counts[ERROR] and counts[RIGHT]


SHORTAGES = pytest.mark.parametrize("shortage", [short_files, failing_call, small_disk])


@pytest.fixture(scope="module")
def posteriors() -> tuple[bh.Posterior, bh.Posterior]:
    model = tiny_model((bh.peft.LoRA(rank=1),), outputs=20)
    first = bh.fit(model, "normal", tiny_examples(), max_steps=1, progress=False)
    return first, first.update(tiny_examples(12, seed=1))


@SHORTAGES
@sized(4, 1)
def test_saves_on_a_full_disk(
    runs: int, shortage: Shortage, posteriors: tuple[bh.Posterior, ...], tmp_path: Path
) -> None:
    """`runs` is the distance of the sizes."""
    (old, new), disk = posteriors, tmp_path / "disk"
    folder = disk / "run"

    def attempt(shortage: Shortage, size: int) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        if size % 2:
            old.save(folder)
        try:
            with shortage(disk, size):
                new.save(folder, overwrite=True)
            assert same(load(folder), new)
        except WriteError as error:
            assert str(folder) in str(error)
        else:
            return RIGHT
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        assert not any(name.startswith(".posterior") for name in names), names
        if (folder / FILE).exists():
            saved = load(folder)
            assert same(saved, old) or same(saved, new)  # what failed came after the rename
        new.save(folder, overwrite=True)
        assert [path.name for path in folder.iterdir()] == [FILE]
        return ERROR

    check("saves", shortage, disk, range(1, 16, runs), attempt)


@SHORTAGES
@sized(20, 1)
def test_streams_on_a_full_disk(runs: int, shortage: Shortage, tmp_path: Path) -> None:
    """Each goes on once there is room."""
    disk = tmp_path / "disk"
    options: dict[str, Any] = {"guide": "normal", "max_steps": 1, "progress": False}

    def run(folder: Path) -> bh.Posterior:
        return bh.stream(tiny_model(()), WEEKS, folder, **options)

    right = run(tmp_path / "whole")

    def attempt(shortage: Shortage, size: int) -> str:
        shutil.rmtree(disk / "run", ignore_errors=True)
        found = RIGHT
        try:
            with shortage(disk, size):
                assert same(run(disk / "run"), right)
        except WriteError as error:
            assert str(disk / "run") in str(error)
            found = ERROR
        if (disk / "run").exists():
            rounds = History(disk / "run" / "rounds").rounds.values()
            assert [each.name for each in rounds] == [*WEEKS][: len(rounds)]
        assert same(run(disk / "run"), right)
        names = {path.name for path in (disk / "run").iterdir()}
        assert names == {"rounds", "record.json", "record.csv"}
        return found

    check("streams", shortage, disk, range(1, 64, runs), attempt)


# Memory


def starve(left: int) -> list[bytearray]:
    """Take all memory that this process has, and leave it `left` bytes; keep what is returned."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used, most))
    taken = []
    for size in (2**20, 2**16, 2**12):
        try:
            while True:
                taken.append(bytearray(size))
        except MemoryError:
            pass
    resource.setrlimit(resource.RLIMIT_AS, (used + left, most))
    return taken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what is used")
@sized(3, 40)
def test_too_little_memory(runs: int, posteriors: tuple[bh.Posterior, ...], tmp_path: Path) -> None:
    """Rust's allocator, in tokenizers and safetensors, ends its process as a kill does."""
    old, _ = posteriors
    wide = bh.fit(old.model, "mvn", tiny_examples(), max_steps=1, progress=False)
    folder, new = wide.save(tmp_path / "run"), tiny_examples(100, seed=1)
    rows = [" ".join(f"w{i * j % 40}" for j in range(30)) for i in range(60)]
    acts: dict[str, Callable[[], Any]] = {
        "save": lambda: same(load(wide.save(folder, overwrite=True)), wide),
        "load": lambda: same(load(folder), wide),
        "predict": lambda: old.predict(rows, 1, max_rows=60).probabilities.sum(),
        "sample": lambda: wide.sample(16)["head.weight"].sum(),
        "update": lambda: old.update(new, max_steps=1, batch_size=100).sample(1)["head.bias"].sum(),
    }
    expected = {name: float(act()) for name, act in acts.items()}
    forecast = old.predict(["w5 w9"], 2).probabilities

    def attempt(name: str, left: int) -> str:
        faulthandler.disable()  # or pytest's prints a page for each process that ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's last words
        os.environ["RUST_BACKTRACE"] = "0"  # which takes memory, and never ends without
        taken = starve(left)
        try:
            assert float(acts[name]()) == expected[name]
            found = RIGHT
        except BHPEFTError as error:
            found = f"{type(error).__name__}: {error}"
        except Exception as error:
            found = OLD if is_out_of_memory(error) else repr(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            taken.clear()
        assert torch.equal(old.predict(["w5 w9"], 2).probabilities, forecast)
        return found

    result = tmp_path / "outcome"
    for name in acts:
        counts = Counter[str]()
        for number in range(runs):
            left = int(2 ** (12 + 18 * number / (runs - 1)))  # bytes, from 4 kB to 1 GB
            result.unlink(missing_ok=True)
            code = wait(start(lambda name=name, left=left: attempt(name, left), result))  # type: ignore[misc]
            counts[ENDED if code else json.loads(result.read_text())] += 1
            assert same(load(folder), wide)
        report(f"{name} with little memory", counts, ENDED)
        assert counts[RIGHT] and counts[RIGHT] < runs
