"""The folder of a saved posterior: an index with a checksum, which names a file of tensors.

Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

The index names the tensor file by its digest and is replaced last and at once, so a crash at any
moment leaves the folder with the old posterior or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SaveError
from ..inference.report import FitReport
from ..model.head import ClassifierHead
from ..priors import PriorLike
from . import stored

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = [
    "FORMAT",
    "INDEX",
    "backbone_name",
    "exists",
    "has_classifier_head",
    "index_of",
    "keep_names",
    "lineage_of",
    "load",
    "read_index",
    "read_lineage",
    "read_report",
    "read_tensors",
    "save",
    "write",
]


FORMAT = 2
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


def save(posterior: Posterior, folder: Path, overwrite: bool, alone: bool = True) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`.

    Unless it is to stand `alone`, reports of rounds whose folders, named by their ids, are beside
    it are not written again, so a round takes the same room however many were before it.
    """
    index = folder / INDEX
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"path: {folder} is a file; expected a folder, or the name of a new one")
    if index.exists() and not overwrite:
        raise SaveError(f"path: {folder} holds a posterior already; pass overwrite=True to replace")
    described, tensors = stored.describe(posterior)
    # A guide that has learnt nothing since it became a prior shares its tensors with that.
    data = dump_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    new = f"posterior-{digest[:16]}.safetensors"
    reports = posterior.lineage
    known = [i for i, r in enumerate(reports) if not alone and exists(folder.with_name(r.id))]
    text = index_of(
        {
            "format": FORMAT,
            "tensors": {"file": new, "sha256": digest},
            **described,
            "lineage": [report.to_json() for report in reports[max(known, default=-1) + 1 :]],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    # What was saved here, and what a save that was killed has left (`files.write`).
    old = {f.name for s in ("posterior-*.safetensors", ".posterior*") for f in folder.glob(s)}
    write(folder / new, data)
    write(index, text)
    for stale in old - {new}:
        (folder / stale).unlink(missing_ok=True)
    return folder


def backbone_name(folder: Path) -> str:
    """What the backbone of a saved posterior is called: a name on the hub, or a folder.

    Raises:
        SaveError: there is no posterior, it was altered, or its backbone had no name.
    """
    name = str(read_index(folder).get("backbone", {}).get("name") or "")
    if not name:
        raise SaveError(f"backbone: the posterior in {folder} was fitted on one without a name")
    return name


def has_classifier_head(folder: Path) -> bool:
    """Whether the backbone of a saved posterior has to be a sequence classifier."""
    head: dict[str, Any] = read_index(folder).get("head", {})
    return head.get("class") == ClassifierHead.__name__


def load(
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
) -> Posterior:
    """Read a posterior; see `Posterior.load`."""
    if not isinstance(backbone, PreTrainedModel):
        raise SaveError(
            "backbone: expected the transformers model that this posterior was fitted on, got "
            f"{type(backbone).__name__}"
        )
    content = read_index(folder)
    try:
        tensors = read_tensors(folder / content["tensors"]["file"], content["tensors"]["sha256"])
        lineage = lineage_of(folder, content)
        return stored.revive(content, tensors, lineage, backbone, tokenizer, prior)
    except (KeyError, TypeError, AttributeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error
