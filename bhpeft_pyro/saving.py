"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

The index names the tensor file by its digest and is replaced last and at once, so a crash at any
moment leaves the folder with the old posterior or the new one, whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save as dump_tensors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import stored
from .errors import SaveError
from .files import FORMAT, INDEX, exists, index_of, lineage_of, read_index, read_tensors, write
from .priors import PriorLike

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["backbone_name", "load", "save"]


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
