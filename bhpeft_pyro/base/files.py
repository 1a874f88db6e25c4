"""Files that are written whole, by one process at a time, and are on the disk afterwards.

`NAME` is written as `.NAME.new`, flushed and renamed, under the lock `.NAME.lock`. If a kill leaves
one of these, the next writer takes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ..errors import BusyError, WriteError

_WAIT = 60.0  # seconds that a writer waits for another; it takes a few at most


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


@contextmanager
def alone(path: Path, busy: str = "") -> Iterator[None]:
    """Be the only process that writes `path`; the lock ends with its process. Give up after a
    minute; at once if there are words for what the other one does."""
    file, wait = path.with_name(f".{path.name}.lock"), 0 if busy else _WAIT
    lock = FileLock(file, timeout=wait)
    with naming(path):
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(
                busy or f"path: another process has been writing {path} for {wait:g} seconds"
            ) from None
    try:
        yield
    finally:
        # While it is held: who waits for it sees that the file is gone, and makes a new one.
        with suppress(PermissionError):  # where an open file cannot be removed
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end; not after an error."""
    new = path.with_name(f".{path.name}.new")
    with naming(path), alone(path):
        try:
            with new.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a file as `writing` does."""
    with writing(path) as file:
        file.write(data)


def flush_folder(folder: Path) -> None:
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
        flush_folder(path.parent)
