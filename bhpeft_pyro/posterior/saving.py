"""Posteriors on disk: a safetensors file for each, never a pickle.

A folder holds `posterior.safetensors`. One rename puts it there, so after a kill at any moment it
is the old posterior or the new one, and who is reading the old one goes on reading it. One process
at a time writes it; any number may read. The metadata in its header are:

    posterior   all but the tensors, as JSON
    tensors     SHA-256 of the bytes behind the header
    header      SHA-256 of the rest of the header, so that it can be read without the tensors

`FORMAT` goes up when another version of the package would misread a file; that version refuses it.
What is added without that, such as a field of a report with a default, leaves it as it is:
`tests/posterior/saved` has posteriors of earlier commits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ..base.checks import warn
from ..base.files import make_folder, writing
from ..errors import BHPEFTError, ConfigError, SaveError, is_out_of_memory
from ..model.backbone import device_named, load_backbone
from ..model.head import ClassifierHead
from ..priors import PriorLike
from ..priors.prior_file import Plain
from ..training.report import FitReport
from . import round_file
from .posterior import Posterior

FORMAT = 4
FILE = "posterior.safetensors"

_LARGEST = 100_000_000  # bytes of a header; the safetensors library reads no larger one


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / FILE).exists()


def save(posterior: Posterior, folder: Path, overwrite: bool, alone: bool = True) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`.

    Unless `alone`, the reports of rounds whose folders, named by their ids, are beside this one are
    not written again, so that files do not grow with each round.
    """
    plain, tensors = round_file.to_state(posterior)
    versions = {
        "bhpeft_pyro": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    lineage = _plain_lineage(posterior.lineage, folder, alone)
    plain = {"format": FORMAT, "written_by": versions, **plain, "lineage": lineage}
    parts = packed(plain, tensors)
    make_folder(folder)
    with writing(folder / FILE) as file:
        if exists(folder) and not overwrite:
            raise SaveError(f"path: {folder} holds a posterior already; overwrite=True replaces it")
        file.writelines(parts)
    return folder


def _plain_lineage(reports: tuple[FitReport, ...], folder: Path, alone: bool) -> list[Plain]:
    """The reports as plain data: those of earlier rounds without most of their steps."""
    first = 0
    if not alone:
        # The last one that is beside it leads to those before it, so that they need not be read.
        ids = reversed([*enumerate((report.id for report in reports), 1)])
        first = next((number for number, id in ids if _holds(folder.with_name(id), id)), 0)
    kept = [report.thinned() for report in reports[first:-1]] + [*reports[-1:]]
    return [asdict(report) for report in kept]


def _holds(folder: Path, round_id: str) -> bool:
    """Whether a folder holds this round, and not another one or a damaged file."""
    try:
        return exists(folder) and read_report(folder).id == round_id
    except SaveError:
        return False


def packed(plain: Plain, tensors: Mapping[str, Tensor]) -> tuple[bytes, memoryview]:
    """The bytes of a file: its header, and the tensors behind it."""
    # Clones: a guide and the prior made from it may share tensors, which safetensors refuses.
    data = dump_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    behind = memoryview(data)[start:]
    metadata = {"posterior": json.dumps(plain), "tensors": hashlib.sha256(behind).hexdigest()}
    header = {"__metadata__": metadata, **json.loads(data[8:start])}
    metadata["header"] = digest_of(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    if len(text) > _LARGEST:
        raise SaveError(
            f"path: all but the tensors of this posterior take {len(text):,} bytes, expected at "
            f"most {_LARGEST:,}: the steps of its last round, and the reports of earlier rounds "
            "(which a bh.streams.History keeps apart)"
        )
    return len(text).to_bytes(8, "little") + text, behind


def read(folder: Path) -> tuple[Plain, dict[str, Tensor]]:
    """The plain part and the tensors of a posterior, if they are whole and of this format;
    otherwise a SaveError."""
    path = folder / FILE
    plain, digest, data = _read(path, all_of_it=True)
    start = 8 + int.from_bytes(data[:8], "little")
    if hashlib.sha256(memoryview(data)[start:]).hexdigest() != digest:
        raise SaveError(f"path: {path} was cut off or altered: its checksum does not match")
    try:
        return plain, load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SaveError(f"path: {path} is not a safetensors file: {error}") from error


def read_plain(folder: Path) -> Plain:
    """The plain part alone, without reading tensors."""
    return _read(folder / FILE)[0]


def _read(path: Path, all_of_it: bool = False) -> tuple[Plain, str, bytes]:
    """The plain part, the checksum of the tensors, and what was read of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - 8
            data = file.read(8)
            length = int.from_bytes(data, "little")
            if not length <= min(size, _LARGEST):
                raise ValueError("its header is not whole")
            file.seek(0)
            data = file.read(-1 if all_of_it else 8 + length)
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        whole = metadata.pop("header") == digest_of(header)
        plain = json.loads(metadata["posterior"]) if whole else {}
        digest = str(metadata["tensors"])
    except (FileNotFoundError, NotADirectoryError):
        raise SaveError(f"path: no saved posterior in {path.parent}") from None
    except OSError as error:
        raise SaveError(f"path: cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise SaveError(
            f"path: {path} was cut off or is not a saved posterior: {error!s:.300}"
        ) from error
    if not whole:
        raise SaveError(f"path: {path} was altered: its checksum does not match")
    if not isinstance(plain, dict):
        raise SaveError(f"path: {path} is not a saved posterior: it is no object")
    if (written := plain.get("format")) != FORMAT:
        raise SaveError(f"path: {path} has format {written!r}, expected {FORMAT}{_writer(plain)}")
    return plain, digest, data


def _writer(plain: Plain) -> str:
    """Which version of the package can read a file that this one cannot, as far as it says so."""
    by = plain.get("written_by")
    version = by.get("bhpeft_pyro") if isinstance(by, dict) else None
    if version in (None, __version__):
        return ""
    return (
        f"; bhpeft_pyro {version} wrote it and can read it, and this is bhpeft_pyro {__version__}"
    )


@contextmanager
def _reading(folder: Path, plain: Plain) -> Iterator[None]:
    """Turn what goes wrong where parts are missing or unknown into a SaveError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        own = isinstance(e, BHPEFTError) and not isinstance(e, ConfigError)
        if own or is_out_of_memory(e):
            raise
        raise SaveError(
            f"path: {folder / FILE} has missing or unknown parts: {e!s:.300}{_writer(plain)}"
        ) from e


def load(
    folder: Path,
    backbone: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
    device: str = "auto",
    likelihood: object = None,
    guide: object = None,
) -> Posterior:
    """Read a posterior; see `Posterior.load`. The file is checked before a backbone is loaded."""
    if not isinstance(backbone, PreTrainedModel | str | None):
        raise SaveError(
            "backbone: expected the transformers model that this posterior was fitted on, or its "
            f"name, got {type(backbone).__name__}"
        )
    place = backbone.device if isinstance(backbone, PreTrainedModel) else None
    if place is not None and device != "auto" and device_named(device).type != place.type:
        raise ConfigError(
            f"device: got {device!r}, and the backbone given is on {place.type!r}; expected "
            "'auto', or a backbone that was moved"
        )
    plain, tensors = read(folder)
    lineage = read_lineage(folder, plain)
    if not isinstance(backbone, PreTrainedModel):
        with _reading(folder, plain):
            # One with a classifier of its own is of another class.
            classifier = plain["head"]["class"] == ClassifierHead.__name__
            name = backbone or str(plain["backbone"]["name"] or "")
        if not name:
            raise SaveError(
                f"backbone: {folder / FILE} does not name the transformer that this posterior "
                "was fitted on; expected the model itself: Posterior.load(path, backbone)"
            )
        backbone, its_tokenizer = load_backbone(name, device, classifier)
        tokenizer = its_tokenizer if tokenizer is None else tokenizer
    with _reading(folder, plain):
        given = prior, likelihood, guide
        return round_file.from_state(plain, tensors, lineage, backbone, tokenizer, *given)


def read_report(folder: Path) -> FitReport:
    """The report of a saved posterior's last round, or a SaveError if there is none."""
    reports = _reports(folder, read_plain(folder))
    if not reports:
        raise SaveError(f"path: {folder} holds a posterior of no round")
    return reports[-1]


def _reports(folder: Path, plain: Plain) -> list[FitReport]:
    with _reading(folder, plain):
        return [FitReport.from_json(report) for report in plain["lineage"]]


def read_lineage(folder: Path, plain: Plain) -> tuple[FitReport, ...]:
    """The reports in a file, and those of earlier rounds in the folders beside it."""
    reports = _reports(folder, plain)
    _check_distinct(folder, reports)
    while reports and (parent := reports[0].parent) is not None:
        if not re.fullmatch(r"[\w-]+", parent):
            raise SaveError(
                f"path: {folder / FILE} names {parent!r:.60} as a round; expected an id"
            )
        beside = folder.resolve().with_name(parent)
        if not exists(beside):  # it may have another name
            others = sorted(beside.parent.glob("*"))
            beside = next((other for other in others if _holds(other, parent)), beside)
        if not exists(beside):
            warn(
                f"{folder}: the rounds before {reports[0].id} are not beside it, so the data that "
                "they learnt is not known"
            )
            break
        earlier = _reports(beside, read_plain(beside))
        held = earlier[-1].id if earlier else "none"
        if held != parent:
            raise SaveError(
                f"path: {beside} holds round {held}, expected {parent}, which {folder} continues; "
                "was another folder copied or renamed to it?"
            )
        reports = [*earlier, *reports]
        _check_distinct(folder, reports)
    return tuple(reports)


def _check_distinct(folder: Path, reports: list[FitReport]) -> None:
    times = Counter(report.id for report in reports)
    if twice := {round_id for round_id, count in times.items() if count > 1}:
        raise SaveError(f"path: {folder} continues round {', '.join(sorted(twice))} twice")


def digest_of(plain: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
