"""Files and folders that are written whole, by one process at a time, and are on the disk
afterwards. Nothing is written through a symbolic link that a folder holds: it may come from
elsewhere."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ..errors import BusyError, SaveError, WriteError

if sys.platform != "win32":
    import fcntl

_LOCK = ".posterior.lock"
_BLOCK = 1_000_000  # bytes that `append` looks at together
_WAIT = 60.0  # seconds that a save waits for another; it takes a few at most


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that says what could not be written, and why."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"path: cannot write {path}: {error.strerror or error}") from error


def strict_json(value: object) -> str:
    """JSON; numbers that are not finite, which it lacks, become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, indent=1)


def write(path: Path, data: bytes) -> None:
    """Write a file as `writing` does."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to under a temporary name; it is renamed at the end, or removed on an
    error."""
    with naming(path):
        _remove_left(path)
        temporary, file = _begun(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if sys.platform != "win32":  # where an open file cannot be renamed
                    os.replace(temporary, path)  # while it is locked
            if sys.platform == "win32":
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        keep_names(path.parent)


def _begun(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, which is locked, so that `_remove_left` leaves it."""
    while True:
        # `tempfile` would ignore the umask: nobody else could read its files.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        file = temporary.open("xb")
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # nobody removed it before it was locked
            return temporary, file
        file.close()


def _remove_left(path: Path) -> None:
    """Remove what writers of `path` left that were killed: no process has a lock on it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}"):
        with suppress(OSError, SaveError):
            check_regular(left)
            if sys.platform == "win32":  # where a file that is open is not removed
                left.unlink()
                continue
            with left.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


@contextmanager
def replacing(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end, as a whole.

    That takes two renames. If the process is killed between them, the old folder is beside it as
    `.NAME.before`, and the next call puts it back.

    Args:
        folder: a folder, or the name of a new one.
        check: is called before anything is written, with no other process writing there.
    """
    new, before = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "before"))
    with naming(folder):
        make_folder(folder.parent)
        with alone_in(folder.parent, f".{folder.name}.lock"):
            if before.is_dir() and not folder.exists():
                os.rename(before, folder)
            for left in (new, before):  # by a process that was killed
                if left.exists():
                    shutil.rmtree(left)
            check()
            try:
                make_folder(new)
                yield new
                if folder.exists():
                    os.rename(folder, before)
                os.rename(new, folder)
                keep_names(folder.parent)
            finally:
                if before.exists() and not folder.exists():
                    os.rename(before, folder)
                for left in (new, before):
                    shutil.rmtree(left, ignore_errors=True)


def refuse_link(path: Path) -> None:
    """Raise a WriteError if `path` is a symbolic link."""
    if path.is_symlink():
        raise WriteError(
            f"path: {path} is a symbolic link, and nothing is written through one; expected a file "
            "or folder of its own"
        )


def keep_names(folder: Path) -> None:
    """Flush new names in a folder to disk, on systems where a folder has to be flushed itself."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and flush their names to disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        keep_names(path.parent)


@contextmanager
def alone_in(folder: Path, name: str = _LOCK, busy: str = "") -> Iterator[None]:
    """Let one process at a time write into a folder, where the lock is `name`; it ends with its
    process. Give up after a minute; at once if there are words for what the other one does."""
    file, wait = folder / name, 0 if busy else _WAIT
    refuse_link(file)
    lock = FileLock(file, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            busy or f"path: another process has been saving to {folder} for {wait:g} seconds"
        ) from None
    try:
        yield
    finally:
        # While it is held: who waits for it sees that the file is gone, and makes a new one.
        with suppress(PermissionError):  # of Windows, where it stays
            file.unlink(missing_ok=True)
        lock.release()


def append(path: Path, line: bytes) -> None:
    """Append a line to a file of lines; it is on the disk when this returns, and nothing of it if
    this raises. A last line that a kill has cut, and nobody was told to be there, is removed."""
    with naming(path), alone_in(path.parent, f".{path.name}.lock"):
        refuse_link(path)
        if not (new := not path.exists()):
            check_regular(path)
        with path.open("ab+", buffering=0) as file:  # nothing is left to write on an error
            end = _end_of_lines(file)
            file.truncate(end)
            data = line + b"\n"
            try:
                while data:  # a disk that gets full takes a part
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        if new:
            keep_names(path.parent)


def _end_of_lines(file: FileIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - _BLOCK))
        if newline := file.read(end - start).rfind(b"\n") + 1:
            return start + newline
        end = start
    return 0


def appended(path: Path, start: int = 0) -> tuple[list[bytes], int]:
    """The lines of a file behind a place in it, and where the last one ends; one that is still
    written is left out. Of a file that has become shorter than the place, because it was moved away
    or lines were removed, they are all lines, and end before the place."""
    if not path.exists():
        return [], 0
    check_regular(path)
    with path.open("rb") as file:
        start = start if file.seek(0, os.SEEK_END) >= start else 0
        file.seek(start)
        lines, newline, _ = file.read().rpartition(b"\n")
    return lines.splitlines(), start + len(lines) + len(newline)


def check_regular(file: Path) -> None:
    """Refuse what is no file: reading a FIFO could block for ever, and a device need not end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise SaveError(f"path: {file} is not a regular file")
