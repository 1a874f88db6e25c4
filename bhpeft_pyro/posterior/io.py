"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

A folder holds an index with a checksum, `posterior.json`, and the file of tensors that the index
names by its digest. The index is replaced last and atomically. After a crash at any moment the
folder holds either the old posterior or the new one.
"""

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
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SaveError
from ..inference.report import FitReport
from ..model.backbone import load_backbone
from ..priors import PriorLike
from . import stored
from .state import MixtureState, PosteriorState

__all__ = [
    "FORMAT",
    "INDEX",
    "digest_of",
    "exists",
    "keep_names",
    "load",
    "read_index",
    "read_lineage",
    "read_report",
    "save",
    "write",
]

FORMAT = 2
INDEX = "posterior.json"


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / INDEX).exists()


def save(posterior: PosteriorState, folder: Path, overwrite: bool, alone: bool = True) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`.

    Unless `alone`, the reports of rounds whose folders, named by their ids, are beside this one are
    not written again, so that the index does not grow with each round.
    """
    index = folder / INDEX
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"path: {folder} is a file; expected a folder, or the name of a new one")
    if index.exists() and not overwrite:
        raise SaveError(f"path: {folder} holds a posterior already; overwrite=True replaces it")
    described, tensors = stored.describe(posterior)
    # Clones: a guide and the prior made from it may share tensors, which safetensors refuses.
    data = dump_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    new = f"posterior-{digest[:16]}.safetensors"
    reports = posterior.lineage
    known = [i for i, r in enumerate(reports) if not alone and exists(folder.with_name(r.id))]
    content = {
        "format": FORMAT,
        "tensors": {"file": new, "sha256": digest},
        **described,
        "lineage": [report.to_json() for report in reports[max(known, default=-1) + 1 :]],
    }
    content = json.loads(json.dumps(content))  # as it will be read, so that digests agree
    text = json.dumps({"sha256": digest_of(content), "content": content}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    # The files of an earlier save, and of one that was interrupted (`write`).
    old = {f.name for s in ("posterior-*.safetensors", ".posterior*") for f in folder.glob(s)}
    write(folder / new, data)
    write(index, text.encode())
    for stale in old - {new}:
        (folder / stale).unlink(missing_ok=True)
    return folder


def load(
    folder: Path,
    backbone: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
    device: str = "auto",
) -> PosteriorState | MixtureState:
    """Read a posterior; see `Posterior.load`. The files are checked before a backbone is loaded."""
    if not isinstance(backbone, PreTrainedModel | str | None):
        raise SaveError(
            "backbone: expected the transformers model that this posterior was fitted on, or its "
            f"name, got {type(backbone).__name__}"
        )
    content = read_index(folder)
    try:
        tensors = _read_tensors(folder / content["tensors"]["file"], content["tensors"]["sha256"])
        lineage = _lineage(folder, content)
        if not isinstance(backbone, PreTrainedModel):
            name = backbone or str(content["backbone"]["name"] or "")
            if not name:
                raise SaveError(
                    f"backbone: {folder / INDEX} does not name the transformer that this posterior "
                    "was fitted on; expected the model itself: Posterior.load(path, backbone)"
                )
            backbone, own_tokenizer = load_backbone(name, device)
            tokenizer = own_tokenizer if tokenizer is None else tokenizer
        return stored.revive(content, tensors, lineage, backbone, tokenizer, prior)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_parts(folder, error) from error


def read_index(folder: Path) -> dict[str, Any]:
    """The content of the index.

    Raises:
        SaveError: it is missing, damaged, or of another format.
    """
    index = folder / INDEX
    try:
        saved = json.loads(index.read_bytes())
        content: dict[str, Any] = saved["content"]
        digest = saved["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise SaveError(f"path: no saved posterior in {index.parent}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SaveError(
            f"path: {index} was cut off or is not a saved posterior: {error}"
        ) from error
    if digest != digest_of(content):
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
        raise SaveError(f"path: {file} is not a safetensors file: {error}") from error


def read_lineage(folder: Path) -> tuple[FitReport, ...]:
    """The reports of a saved posterior and of the rounds before it, without reading tensors.

    Raises:
        SaveError: the index is missing or damaged.
    """
    return _lineage(folder, read_index(folder))


def read_report(folder: Path) -> FitReport:
    """The report of a saved posterior's last round."""
    return _reports(folder, read_index(folder))[-1]


def _lineage(folder: Path, content: dict[str, Any]) -> tuple[FitReport, ...]:
    """The reports in an index, and those of earlier rounds in the folders beside it."""
    found = _reports(folder, content)
    while found and (parent := found[0].parent) is not None:
        beside = folder.resolve().with_name(parent)
        if not exists(beside):
            warnings.warn(
                f"{folder}: the rounds before {found[0].id} are not beside it, so the data that "
                "they learnt is not known",
                stacklevel=2,
            )
            break
        found = [*_reports(beside, read_index(beside)), *found]
    return tuple(found)


def _reports(folder: Path, content: dict[str, Any]) -> list[FitReport]:
    try:
        return [FitReport.from_json(report) for report in content["lineage"]]
    except (KeyError, TypeError) as error:
        raise _unknown_parts(folder, error) from error


def _unknown_parts(folder: Path, error: Exception) -> SaveError:
    return SaveError(f"path: {folder / INDEX} has missing or unknown parts: {error}")


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file atomically: under a temporary name, then renamed."""
    # `tempfile` would ignore the umask: nobody else could read its files.
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
    """Flush new names in a folder to disk, on systems where a folder has to be flushed itself."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
