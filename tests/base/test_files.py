"""Files are written whole, and lines appended to them are there after a kill."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from bhpeft_pyro.base.files import append, appended, writing
from bhpeft_pyro.errors import SaveError, WriteError


@pytest.mark.skipif(sys.platform == "win32", reason="it has no FIFOs")
def test_what_is_no_file_does_not_stop_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f".out.txt.{'0' * 16}")
    with writing(tmp_path / "out.txt") as file:
        file.write(b"whole")
    assert (tmp_path / "out.txt").read_bytes() == b"whole"


def test_lines_are_appended_whole_and_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert appended(path) == ([], 0)
    append(path, b"one")
    lines, end = appended(path)
    append(path, b"two\nthree")
    assert lines == [b"one"] and appended(path, end) == ([b"two", b"three"], 14)
    with path.open("ab") as file:
        file.write(b"cut off")  # by a kill
    assert appended(path, 14) == ([], 14)
    append(path, b"four")
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    path.write_bytes(b"cut off")
    append(path, b"five")
    assert path.read_bytes() == b"five\n" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_cut_line_of_any_length_is_removed(tmp_path: Path) -> None:
    """Else the next line would be glued to what is left of it."""
    path = tmp_path / "lines.jsonl"
    for whole in (b"one\n", b""):
        path.write_bytes(whole + b"x" * 11_000_000)
        append(path, b"two")
        assert path.read_bytes() == whole + b"two\n"


@pytest.mark.skipif(sys.platform == "win32", reason="it has no FIFOs")
def test_lines_of_what_is_no_file_are_refused(tmp_path: Path) -> None:
    """A FIFO would be waited for, and a device read for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "device", "folder"):
        with pytest.raises(SaveError, match="not a regular file"):
            appended(tmp_path / name)
        with pytest.raises(SaveError, match=r"regular file|symbolic link"):
            append(tmp_path / name, b"one")


def test_lines_that_cannot_be_kept_leave_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"one\ncut off")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left"):
            append(path, b"two\nthree")
    assert path.read_bytes() == b"one\n"
    append(path, b"two")
    assert appended(path) == ([b"one", b"two"], 8)


def test_a_file_that_got_shorter_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, b"one\ntwo\nthree")
    _, end = appended(path)
    path.write_bytes(b"two\nthree\n")
    assert appended(path, end) == ([b"two", b"three"], 10)
    path.unlink()
    assert appended(path, end) == ([], 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_line_is_lost_by_a_kill_once_it_was_appended(tmp_path: Path) -> None:
    path, there = tmp_path / "lines.jsonl", 0
    for kill in range(100):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                for number in count(there):
                    append(path, b"%d" % number)
                    os.write(writing, b".")
            os._exit(1)
        os.close(writing)
        said = sum(len(os.read(reading, 1)) for _ in range(1 + kill % 7))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(reading, 100):
            said += len(part)
        os.close(reading)
        lines, _ = appended(path)
        assert [*map(int, lines)] == [*range(len(lines))]
        assert there + said <= len(lines) <= there + said + 1  # which was not said yet
        there = len(lines)
