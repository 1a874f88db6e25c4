"""The folder of a saved posterior: an index with a checksum, which names a file of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from .errors import SaveError
from .inference.report import FitReport

__all__ = [
    "FORMAT",
    "INDEX",
    "exists",
    "index_of",
    "keep_names",
    "lineage_of",
    "read_index",
    "read_lineage",
    "read_report",
    "read_tensors",
    "write",
]

FORMAT = 1
INDEX = "posterior.json"


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / INDEX).exists()


def read_index(folder: Path) -> dict[str, Any]:
    """What the index holds.

    Raises:
        SaveError: there is none, it is damaged, or of another format.
    """
    index = folder / INDEX
    try:
        saved = json.loads(index.read_bytes())
        content: dict[str, Any] = saved["content"]
        digest = saved["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise SaveError(f"path: no saved posterior in {index.parent}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SaveError(f"path: {index} is cut off or no saved posterior: {error}") from error
    if digest != digest_of(content):
        raise SaveError(f"path: {index} was altered: its checksum does not match")
    if (found := content.get("format")) != FORMAT:
        raise SaveError(f"path: {index} has format {found}, expected {FORMAT}")
    return content


def read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a file with this digest.

    Raises:
        SaveError: it is missing or damaged.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise SaveError(f"path: {file} is missing") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise SaveError(f"path: {file} was cut off or altered: its checksum does not match")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise SaveError(f"path: {file} is no safetensors file: {error}") from error


def read_lineage(folder: Path) -> tuple[FitReport, ...]:
    """The reports of a saved posterior and of the rounds before it, without its tensors.

    Raises:
        SaveError: there is none, or it is damaged.
    """
    return lineage_of(folder, read_index(folder))


def read_report(folder: Path) -> FitReport:
    """The last of a saved posterior's reports."""
    return _reports(folder, read_index(folder))[-1]


def lineage_of(folder: Path, content: dict[str, Any]) -> tuple[FitReport, ...]:
    """The reports in an index, and those of earlier rounds in the folders beside it."""
    found = _reports(folder, content)
    while found and (parent := found[0].parent) is not None:
        beside = folder.resolve().with_name(parent)
        if not exists(beside):
            warnings.warn(
                f"{folder}: the rounds before {found[0].id} are not beside it, so what they have "
                "learnt is not known here",
                stacklevel=2,
            )
            break
        found = [*_reports(beside, read_index(beside)), *found]
    return tuple(found)


def _reports(folder: Path, content: dict[str, Any]) -> list[FitReport]:
    try:
        return [FitReport.from_json(report) for report in content["lineage"]]
    except (KeyError, TypeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error


def index_of(content: dict[str, Any]) -> bytes:
    """An index that holds plain data."""
    content = json.loads(json.dumps(content))  # as it will be read, so that digests agree
    return json.dumps({"sha256": digest_of(content), "content": content}, indent=1).encode()


def write(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: the file is there whole or not at all."""
    # Not by `tempfile`, whose files nobody else may read, whatever the umask says.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    keep_names(path.parent)


def keep_names(folder: Path) -> None:
    """Make new names in a folder last, where that takes writing the folder itself."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def digest_of(content: Mapping[str, Any]) -> str:
    """Of plain data, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
