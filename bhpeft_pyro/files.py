"""Files that are written whole, by one process at a time, and are on the disk afterwards."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from .distributed import is_main
from .errors import SaveError, WriteError

_LOCK = ".posterior.lock"
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
    """A file to write to under a temporary name; it is renamed at the end, or removed on an error.
    Of several processes that work together, only the first writes."""
    if not is_main():
        with open(os.devnull, "wb") as nothing:
            yield nothing
        return
    # `tempfile` would ignore the umask: nobody else could read its files.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with naming(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        keep_names(path.parent)


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
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        keep_names(each.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time write into a folder; a lock ends with its process. Give up after a
    minute."""
    file = folder / _LOCK
    lock = FileLock(file, timeout=_WAIT)
    try:
        lock.acquire()
    except Timeout:
        raise SaveError(
            f"path: another process has been saving to {folder} for {_WAIT:g} seconds"
        ) from None
    try:
        yield
    finally:
        # While it is held: who waits for it sees that the file is gone, and makes a new one.
        with suppress(PermissionError):  # of Windows, where it stays
            file.unlink(missing_ok=True)
        lock.release()


def size_of(file: Path) -> int:
    """Bytes of a regular file: reading a FIFO could block for ever, and a device need not end."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise SaveError(f"path: {file} is not a regular file")
    return found.st_size
