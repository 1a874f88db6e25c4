"""Files are written whole, and lines appended to them are there after a kill."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bhpeft_pyro.base.files import append, appended, write, writing
from bhpeft_pyro.errors import WriteError


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, b"old")
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    (tmp_path / ".rows.csv.new").write_bytes(b"of one that was killed")
    (tmp_path / ".rows.csv.lock").touch()
    write(path, b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


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
    assert path.read_bytes() == b"five\n" and [*tmp_path.iterdir()] == [path]


def test_lines_that_cannot_be_kept_leave_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
