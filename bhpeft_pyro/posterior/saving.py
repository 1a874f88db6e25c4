"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

A folder holds an index with a checksum, `posterior.json`, and the file of tensors that the index
names by its digest. The index is replaced last and atomically. After a crash at any moment the
folder holds either the old posterior or the new one. One process at a time writes into a folder;
any number may read.

`FORMAT` goes up when another version of the package would misread a file; that version refuses it.
What is added without that, such as a field of a report with a default, leaves it as it is:
`tests/posterior/saved` has posteriors of earlier commits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..base.checks import shallow
from ..base.distributed import is_main
from ..base.files import alone_in, make_folder, size_of, write
from ..errors import BHPEFTError, SaveError, is_out_of_memory
from ..model.backbone import load_backbone
from ..model.head import ClassifierHead
from ..priors import PriorLike
from ..training.report import FitReport
from . import state
from .posterior import Posterior

FORMAT = 2
INDEX = "posterior.json"

# The names that `save` gives: nothing else in a folder is read or removed.
_TENSORS = re.compile(r"posterior-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.posterior(\.json|-[0-9a-f]{16}\.safetensors)\.[0-9a-f]{16}")
_LARGEST = 2**30  # bytes of an index
_DEEPEST = 40  # levels of an index; a posterior has about ten


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / INDEX).exists()


def save(posterior: Posterior, folder: Path, overwrite: bool, alone: bool = True) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`.

    Unless `alone`, the reports of rounds whose folders, named by their ids, are beside this one are
    not written again, so that the index does not grow with each round.
    """
    if not is_main():
        return folder
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"path: {folder} is a file; expected a folder, or the name of a new one")
    _check_free(folder, overwrite)
    described, tensors = state.describe(posterior)
    # Clones: a guide and the prior made from it may share tensors, which safetensors refuses.
    data = dump_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    new = f"posterior-{digest[:16]}.safetensors"
    content = {
        "format": FORMAT,
        "written_by": {
            "bhpeft_pyro": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "tensors": {"file": new, "sha256": digest, "bytes": len(data)},
        **described,
        "lineage": _described_lineage(posterior.lineage, folder, alone),
    }
    content = json.loads(json.dumps(content))  # as it will be read, so that digests agree
    make_folder(folder)
    with alone_in(folder):
        _check_free(folder, overwrite)  # another process may have been faster
        write(folder / new, data)
        index = {"sha256": digest_of(content), "content": content}
        write(folder / INDEX, json.dumps(index, indent=1).encode())
        for name in os.listdir(folder):  # of the save before, and of those that were killed
            if name != new and (_TENSORS.fullmatch(name) or _TEMPORARY.fullmatch(name)):
                (folder / name).unlink(missing_ok=True)
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if exists(folder) and not overwrite:
        raise SaveError(f"path: {folder} holds a posterior already; overwrite=True replaces it")


def _described_lineage(
    reports: tuple[FitReport, ...], folder: Path, alone: bool
) -> list[dict[str, Any]]:
    """The reports as plain data: those of earlier rounds without most of their steps."""
    first = 0
    if not alone:
        # The last one that is beside it leads to those before it, so that they need not be read.
        numbers = range(len(reports), 0, -1)
        ids = {number: reports[number - 1].id for number in numbers}
        first = next((n for n in numbers if _holds(folder.with_name(ids[n]), ids[n])), 0)
    kept = [report.thinned() for report in reports[first:-1]] + [*reports[-1:]]
    return [asdict(report) for report in kept]


def _holds(folder: Path, round_id: str) -> bool:
    """Whether a folder holds this round, and not another one or a damaged file."""
    try:
        return exists(folder) and read_report(folder).id == round_id
    except SaveError:
        return False


def load(
    folder: Path,
    backbone: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
    device: str = "auto",
    likelihood: object = None,
    guide: object = None,
) -> Posterior:
    """Read a posterior (`state.revive`); see `Posterior.load`. The files are checked before a
    backbone is loaded."""
    if not isinstance(backbone, PreTrainedModel | str | None):
        raise SaveError(
            "backbone: expected the transformers model that this posterior was fitted on, or its "
            f"name, got {type(backbone).__name__}"
        )
    content, tensors = _read(folder)
    lineage = _lineage(folder, content)
    if not isinstance(backbone, PreTrainedModel):
        saved_name, classifier = _saved_backbone(folder, content)
        name = backbone or saved_name
        if not name:
            raise SaveError(
                f"backbone: {folder / INDEX} does not name the transformer that this posterior "
                "was fitted on; expected the model itself: Posterior.load(path, backbone)"
            )
        backbone, own_tokenizer = load_backbone(name, device, classifier)
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
    try:
        own = prior, likelihood, guide
        return state.revive(content, tensors, lineage, backbone, tokenizer, *own)
    except BHPEFTError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if is_out_of_memory(e):
            raise
        raise _unknown_parts(folder, content, e) from e


def _saved_backbone(folder: Path, content: dict[str, Any]) -> tuple[str, bool]:
    """The backbone's name, and whether it is one with a classifier of its own."""
    try:
        classifier = content["head"]["class"] == ClassifierHead.__name__
        return str(content["backbone"]["name"] or ""), classifier
    except (KeyError, TypeError) as error:
        raise _unknown_parts(folder, content, error) from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index and the tensors that it names, which a save may replace between the two."""
    content = read_index(folder)
    while True:
        try:
            return content, _read_tensors(folder, content)
        except FileNotFoundError as error:
            before, content = content, read_index(folder)
            if content == before:
                raise SaveError(f"path: {error.filename} is missing") from None
        except OSError as error:
            raise SaveError(f"path: cannot read {folder}: {error.strerror or error}") from error


def read_index(folder: Path) -> dict[str, Any]:
    """The content of the index, if it is whole and of this format; otherwise a SaveError."""
    index = folder / INDEX
    try:
        if size_of(index) > _LARGEST:
            raise SaveError(f"path: {index} is larger than {_LARGEST / 2**30:g} GiB")
        saved = json.loads(index.read_bytes())
        content: dict[str, Any] = saved["content"]
        known = saved["sha256"] == digest_of(content)
    except (FileNotFoundError, NotADirectoryError):
        raise SaveError(f"path: no saved posterior in {index.parent}") from None
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(f"path: cannot read {index}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SaveError(
            f"path: {index} was cut off or is not a saved posterior: {error}"
        ) from error
    if not known:
        raise SaveError(f"path: {index} was altered: its checksum does not match")
    if not isinstance(content, dict) or not shallow(content, _DEEPEST):
        raise SaveError(f"path: {index} is not a saved posterior: it is no object, or too deep")
    if (found := content.get("format")) != FORMAT:
        raise SaveError(f"path: {index} has format {found!r}, expected {FORMAT}{_writer(content)}")
    return content


def _writer(content: dict[str, Any]) -> str:
    """Which version of the package can read a file that this one cannot, as far as it says so."""
    by = content.get("written_by")
    version = by.get("bhpeft_pyro") if isinstance(by, dict) else None
    if version in (None, __version__):
        return ""
    return (
        f"; bhpeft_pyro {version} wrote it and can read it, and this is bhpeft_pyro {__version__}"
    )


def _read_tensors(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    try:
        named = content["tensors"]
        name, digest, size = str(named["file"]), named["sha256"], named.get("bytes")
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_parts(folder, content, error) from error
    if not _TENSORS.fullmatch(name):
        raise SaveError(
            f"path: {folder / INDEX} names {name!r:.60} as its tensors; expected a file beside it, "
            "posterior-DIGEST.safetensors"
        )
    file = folder / name
    whole = size in (None, size_of(file))
    data = file.read_bytes() if whole else b""
    if not whole or hashlib.sha256(data).hexdigest() != digest:
        raise SaveError(f"path: {file} was cut off or altered: its checksum does not match")
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SaveError(f"path: {file} is not a safetensors file: {error}") from error


def read_lineage(folder: Path) -> tuple[FitReport, ...]:
    """The reports of a saved posterior and of the rounds before it, without reading tensors."""
    return _lineage(folder, read_index(folder))


def read_report(folder: Path) -> FitReport:
    """The report of a saved posterior's last round, or a SaveError if there is none."""
    reports = _reports(folder, read_index(folder))
    if not reports:
        raise SaveError(f"path: {folder} holds a posterior of no round")
    return reports[-1]


def _lineage(folder: Path, content: dict[str, Any]) -> tuple[FitReport, ...]:
    """The reports in an index, and those of earlier rounds in the folders beside it."""
    found = _reports(folder, content)
    _check_distinct(folder, found)
    while found and (parent := found[0].parent) is not None:
        if not re.fullmatch(r"[\w-]+", parent):
            raise SaveError(
                f"path: {folder / INDEX} names {parent!r:.60} as a round; expected an id"
            )
        beside = folder.resolve().with_name(parent)
        if not exists(beside):  # it may have another name
            every = sorted(beside.parent.glob("*"))
            beside = next((each for each in every if _holds(each, parent)), beside)
        if not exists(beside):
            warnings.warn(
                f"{folder}: the rounds before {found[0].id} are not beside it, so the data that "
                "they learnt is not known",
                stacklevel=2,
            )
            break
        earlier = _reports(beside, read_index(beside))
        held = earlier[-1].id if earlier else "none"
        if held != parent:
            raise SaveError(
                f"path: {beside} holds round {held}, expected {parent}, which {folder} continues; "
                "was another folder copied or renamed to it?"
            )
        found = [*earlier, *found]
        _check_distinct(folder, found)
    return tuple(found)


def _check_distinct(folder: Path, reports: list[FitReport]) -> None:
    ids = [report.id for report in reports]
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise SaveError(f"path: {folder} continues round {', '.join(sorted(twice))} twice")


def _reports(folder: Path, content: dict[str, Any]) -> list[FitReport]:
    try:
        return [FitReport.from_json(report) for report in content["lineage"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unknown_parts(folder, content, error) from error


def _unknown_parts(folder: Path, content: dict[str, Any], error: Exception) -> SaveError:
    return SaveError(
        f"path: {folder / INDEX} has missing or unknown parts: {error!s:.300}{_writer(content)}"
    )


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
