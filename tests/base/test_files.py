"""Files are written whole, and lines appended to them are there after a kill."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from bhpeft_pyro.base.files import append, appended, writing


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
