"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

`posterior.json` names the tensor file by its digest and is replaced last and at once, so a crash
at any moment leaves the folder with the old posterior or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import stored
from .errors import SaveError
from .inference.report import FitReport
from .priors import PriorLike

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["backbone_name", "exists", "load", "read_lineage", "save", "write"]

FORMAT = 1
INDEX = "posterior.json"


def save(posterior: Posterior, folder: Path, overwrite: bool) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`."""
    index = folder / INDEX
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"path: {folder} is a file; expected a folder, or the name of a new one")
    if index.exists() and not overwrite:
        raise SaveError(f"path: {folder} holds a posterior already; pass overwrite=True to replace")
    described, tensors = stored.describe(posterior)
    data = dump_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    content = {
        "format": FORMAT,
        "tensors": {"file": f"posterior-{digest[:16]}.safetensors", "sha256": digest},
        **described,
    }
    content = json.loads(json.dumps(content))  # as it will be read, so that digests agree
    folder.mkdir(parents=True, exist_ok=True)
    old = {file.name for file in folder.glob("posterior-*.safetensors")}
    new = content["tensors"]["file"]
    write(folder / new, data)
    text = json.dumps({"sha256": _digest(content), "content": content}, indent=1)
    write(index, text.encode())
    for stale in old - {new}:
        (folder / stale).unlink(missing_ok=True)
    return folder


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / INDEX).exists()


def backbone_name(folder: Path) -> str:
    """What the backbone of a saved posterior is called: a name on the hub, or a folder.

    Raises:
        SaveError: there is no posterior, it was altered, or its backbone had no name.
    """
    name = str(_read_index(folder / INDEX).get("backbone", {}).get("name") or "")
    if not name:
        raise SaveError(f"backbone: the posterior in {folder} was fitted on one without a name")
    return name


def load(
    cls: type[Posterior],
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
) -> Posterior:
    """Read a posterior; see `Posterior.load`."""
    content = _read_index(folder / INDEX)
    try:
        tensors = _read_tensors(folder / content["tensors"]["file"], content["tensors"]["sha256"])
        return stored.revive(cls, content, tensors, backbone, tokenizer, prior)
    except (KeyError, TypeError, AttributeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error


def read_lineage(folder: Path) -> tuple[FitReport, ...]:
    """The reports of a saved posterior, without its tensors.

    Raises:
        SaveError: there is none, or it is damaged.
    """
    content = _read_index(folder / INDEX)
    try:
        return tuple(FitReport.from_json(report) for report in content["lineage"])
    except (KeyError, TypeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error


def _read_index(index: Path) -> dict[str, Any]:
    try:
        saved = json.loads(index.read_bytes())
        content: dict[str, Any] = saved["content"]
        digest = saved["sha256"]
    except FileNotFoundError:
        raise SaveError(f"path: no saved posterior in {index.parent}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SaveError(f"path: {index} is cut off or no saved posterior: {error}") from error
    if digest != _digest(content):
        raise SaveError(f"path: {index} was altered: its checksum does not match")
    if (found := content.get("format")) != FORMAT:
        raise SaveError(f"path: {index} has format {found}, expected {FORMAT}")
    return content


def _read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
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


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: the file is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
