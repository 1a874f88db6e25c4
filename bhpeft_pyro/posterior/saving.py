"""Posteriors on disk: a safetensors file for each, never a pickle.

A folder holds `posterior.safetensors`. One rename puts it there, so after a kill at any moment it
is the old posterior or the new one, and who is reading the old one goes on reading it. One process
at a time writes it; any number may read. The metadata in its header are:

    posterior   all but the tensors, as `codec` packs it, in JSON. "format" and "written_by" say who
                can read it; "tensors" is the SHA-256 of the names, types, shapes and bytes of all
                tensors
    digest      the SHA-256 of that JSON, so that reports can be read without the tensors

`FORMAT` goes up when another version of the package would misread a file; that version refuses it.
What is added without that, such as a field of a report with a default, leaves it as it is:
`tests/posterior/saved` has posteriors of earlier commits.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..base.checks import warn
from ..base.files import make_folder, writing
from ..data import Columns
from ..decisions.novelty import Novelty
from ..decisions.promises import Promise
from ..errors import BHPEFTError, ConfigError, SaveError, is_out_of_memory
from ..model.backbone import check_fingerprint, fingerprint, load_backbone
from ..model.head import ClassifierHead, Head, with_tail
from ..model.likelihoods import Likelihood
from ..model.model import Model
from ..model.network import RandomPEFT
from ..prediction.student import Student
from ..priors import Prior, PriorLike
from ..priors.any_prior import held_fixed, moved
from ..training.report import FitReport
from .codec import (
    Plain,
    Tensors,
    has_own,
    load_state,
    own_likelihood,
    own_prior,
    pack,
    unpack,
    unpack_guide,
)
from .posterior import Posterior

FORMAT = 5
FILE = "posterior.safetensors"

_LARGEST = 100_000_000  # bytes of a header; the safetensors library reads no larger one
_PARTS: dict[str, Any] = {  # what there is of a posterior, but for lineage, backbone and guides
    "columns": Columns,
    "kinds": tuple,
    "head": Head | ClassifierHead,
    "likelihood": Likelihood,
    "network": dict,
    "tail": dict,
    "priors": list,
    "first_priors": list | None,
    "fixed": dict,
    "learnt_rows": Tensor | None,
    "student": Student | None,
    "promised": Promise | None,
    "novelty": Novelty | None,
}
_COUNTS = ("rank", "size", "length", "outputs", "levels")  # with weights for each


def exists(folder: Path) -> bool:
    """Whether a folder holds a posterior."""
    return (folder / FILE).exists()


# Writing


def save(posterior: Posterior, folder: Path, overwrite: bool, alone: bool = True) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`.

    Unless `alone`, the reports of rounds whose folders, named by their ids, are beside this one are
    not written again, so that files do not grow with each round.
    """
    tensors: Tensors = {}
    lineage = pack(_lineage(posterior.lineage, folder, alone), "lineage", tensors)
    plain = _plain(posterior, tensors) | {"lineage": lineage}
    _check_finite(tensors)
    data = packed(plain, tensors)
    make_folder(folder)
    with writing(folder / FILE) as file:
        if exists(folder) and not overwrite:
            raise SaveError(f"path: {folder} holds a posterior already; overwrite=True replaces it")
        file.write(data)
    return folder


def _lineage(reports: tuple[FitReport, ...], folder: Path, alone: bool) -> list[FitReport]:
    """The reports to write: those of earlier rounds without most of their steps."""
    first = 0
    if not alone:
        # The last one that is beside it leads to those before it, so that they need not be read.
        ids = reversed([*enumerate((report.id for report in reports), 1)])
        first = next((number for number, id in ids if _holds(folder.with_name(id), id)), 0)
    return [report.thinned() for report in reports[first:-1]] + [*reports[-1:]]


def _holds(folder: Path, round_id: str) -> bool:
    """Whether a folder holds this round, and not another one or a damaged file."""
    try:
        return exists(folder) and read_report(folder).id == round_id
    except SaveError:
        return False


def _plain(posterior: Posterior, tensors: Tensors) -> Plain:
    """All but the lineage as plain data; its tensors are added to `tensors`."""
    network, priors = posterior.model.network, posterior.priors
    plain = pack_model(posterior.model, tensors)
    own = {
        "priors": _shared(priors),
        "first_priors": _shared(posterior.first_priors),
        "guides": [*posterior.guides],
    }
    if all(map(operator.is_, priors, posterior.first_priors)):
        own["first_priors"] = None  # in the first round they are the priors
    plain |= pack(own, "", tensors, own=True)
    fixed = held_fixed(priors[0], posterior.model.sites) if has_own(plain["priors"]) else {}
    parts = {
        "backbone": fingerprint(network),
        "columns": posterior.columns,
        "network": network.state_dict(),
        "tail": network.head.tail(network.backbone),
        "fixed": fixed,
        "learnt_rows": posterior.learnt_rows,
        "student": posterior.student,
        "promised": posterior.promised,
        "novelty": posterior.novelty,
    }
    return plain | pack(parts, "", tensors)


def _shared(priors: Sequence[Prior | None]) -> list[Prior | None]:
    """The priors of all components; one if it is the same for all."""
    return [*(priors[:1] if all(prior is priors[0] for prior in priors) else priors)]


def pack_model(model: Model, tensors: Tensors) -> Plain:
    """The PEFT kinds, the head and the likelihood of a model. Raises a SaveError if the former are
    a user's own, or the latter cannot be made again."""
    network = pack({"kinds": model.network.kinds, "head": model.network.head}, "", tensors)
    return {**network, "likelihood": pack(model.likelihood, "likelihood", tensors, own=True)}


def packed(plain: Plain, tensors: Tensors) -> bytes:
    """The bytes of a file."""
    about = {"format": FORMAT, "written_by": {"bhpeft_pyro": __version__}}
    text = json.dumps({**about, **plain, "tensors": _digest(tensors)})
    metadata = {"posterior": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
    data = dump_tensors(tensors, metadata)
    if (length := int.from_bytes(data[:8], "little")) > _LARGEST:
        raise SaveError(
            f"path: all but the tensors of this posterior take {length:,} bytes, expected at "
            f"most {_LARGEST:,}: the steps of its last round, and the reports of earlier rounds "
            "(which a bh.streams.History keeps apart)"
        )
    return data


def _check_finite(tensors: Tensors) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise SaveError(f"path: the tensor {name!r} is not finite")


def _digest(tensors: Tensors) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole.update(f"{name} {value.dtype} {[*value.shape]} ".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


# Reading


def read(folder: Path) -> tuple[Plain, Tensors]:
    """The plain part and the tensors of a posterior, if they are whole and of this format;
    otherwise a SaveError."""
    plain, data = _read(folder, all_of_it=True)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SaveError(f"path: {folder / FILE} was cut off or altered: {error}") from error
    if _digest(tensors) != plain.get("tensors"):
        raise SaveError(f"path: {folder / FILE} was altered: the digest of its tensors differs")
    return plain, tensors


def read_plain(folder: Path) -> Plain:
    """The plain part alone, without reading tensors."""
    return _read(folder)[0]


def _read(folder: Path, all_of_it: bool = False) -> tuple[Plain, bytes]:
    """The plain part, and what was read of the file."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - 8
            length = int.from_bytes(file.read(8), "little")
            if not length <= min(size, _LARGEST):
                raise ValueError("its header is not whole")
            file.seek(0)
            data = file.read(-1 if all_of_it else 8 + length)
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, digest = metadata["posterior"], metadata.get("digest")
        whole = hashlib.sha256(text.encode()).hexdigest() == digest
        plain = json.loads(text)
        written, by = plain.get("format"), plain.get("written_by")
    except (FileNotFoundError, NotADirectoryError):
        raise SaveError(f"path: no saved posterior in {folder}") from None
    except OSError as error:
        raise SaveError(f"path: cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise SaveError(
            f"path: {path} was cut off or is not a saved posterior: {error!s:.300}"
        ) from error
    if written != FORMAT:
        version = by.get("bhpeft_pyro") if isinstance(by, dict) else None
        raise SaveError(
            f"path: {path} has format {written!r:.60} of bhpeft_pyro {version!s:.60}; expected "
            f"format {FORMAT}, of bhpeft_pyro {__version__}: fit again, or use the other version"
        )
    if not whole:
        raise SaveError(f"path: {path} was altered: its digest differs")
    return plain, data


@contextmanager
def _reading(folder: Path, part: str) -> Iterator[None]:
    """Turn what goes wrong where something is missing or unknown into a SaveError."""
    try:
        yield
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    ) as e:
        own = isinstance(e, BHPEFTError) and not isinstance(e, ConfigError)
        if own or is_out_of_memory(e):
            raise
        raise SaveError(
            f"path: {part} in {folder / FILE} has missing or unknown parts: {e!s:.300}"
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
    plain, tensors = read(folder)
    _check_finite(tensors)
    lineage = read_lineage(folder, plain)
    room = sum(value.numel() for value in tensors.values())
    parts = _unpacked(folder, plain, tensors, prior, likelihood)
    if not isinstance(backbone, PreTrainedModel):
        with _reading(folder, "backbone"):
            name = backbone or str(plain["backbone"]["name"] or "")
        if not name:
            raise SaveError(
                f"backbone: {folder / FILE} does not name the transformer that this posterior "
                "was fitted on; expected the model itself: Posterior.load(path, backbone)"
            )
        # One with a classifier of its own is of another class.
        loaded = load_backbone(name, device, isinstance(parts["head"], ClassifierHead))
        backbone, tokenizer = loaded[0], loaded[1] if tokenizer is None else tokenizer
    with _reading(folder, "network"):
        _check_room(parts, room, backbone)
        if parts["tail"]:
            backbone = with_tail(backbone, parts["tail"])
        head = parts["head"]
        check_fingerprint(RandomPEFT(backbone, (), head, tokenizer), plain["backbone"])
        network = RandomPEFT(backbone, parts["kinds"], head, tokenizer)
        load_state(network, parts["network"], "network")
        network.in_use = True
    with _reading(folder, "guides"):
        posterior = _fitted(plain["guides"], tensors, parts, network, lineage, guide)
    for name in ("student", "promised", "novelty"):
        with _reading(folder, name):
            if parts[name] is not None:
                parts[name].check(posterior.model)
    return posterior.replace(**{name: parts[name] for name in ("student", "promised", "novelty")})


def _unpacked(
    folder: Path, plain: Plain, tensors: Tensors, prior: PriorLike | None, likelihood: object
) -> dict[str, Any]:
    """The parts of a posterior by name."""
    own = {
        "priors": partial(own_prior, prior),
        "first_priors": partial(own_prior, prior),
        "likelihood": partial(own_likelihood, likelihood),
    }
    parts = {}
    for name, kind in _PARTS.items():
        with _reading(folder, name):
            # A user's own first prior is not needed, unless the last round's has it in it.
            unknown = name == "first_priors" and prior is None and has_own(plain[name])
            saved = [None] if unknown else plain[name]
            parts[name] = unpack(saved, name, tensors, own.get(name))
            if not isinstance(parts[name], kind):
                raise TypeError(f"got a {type(parts[name]).__name__}")
    return parts


def _check_room(parts: Mapping[str, Any], room: int, backbone: PreTrainedModel) -> None:
    """Refuse sizes, such as ranks, for which the file has too few weights, before anything of that
    size is made."""
    width = getattr(backbone.config, "hidden_size", 1)
    for part in (*parts["kinds"], parts["head"], parts["likelihood"]):
        for name in _COUNTS:
            count, weights = getattr(part, name, None) or 0, 1 if name == "levels" else width
            if count * weights > room:
                raise SaveError(
                    f"path: the saved {type(part).__name__} has {name}={count}, and all tensors "
                    f"of the file together only {room} entries"
                )


def _fitted(
    guides: Sequence[Plain],
    tensors: Tensors,
    parts: Mapping[str, Any],
    network: RandomPEFT,
    lineage: tuple[FitReport, ...],
    given: object,
) -> Posterior:
    """The posterior, without a student, a promise and novelty."""
    rows = parts["learnt_rows"]
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"learnt_rows are {rows.dtype} of shape {tuple(rows.shape)}")
    priors = _of_components(parts["priors"], len(guides), network)
    first_priors = priors
    if parts["first_priors"] is not None:
        first_priors = _of_components(parts["first_priors"], len(guides), network)
    models = [Model(network, prior, parts["likelihood"]) for prior in priors]
    _check_fixed(models[0], parts["fixed"])
    fitted = [
        unpack_guide(plain, f"guides.{number}", tensors, model, given)
        for number, (plain, model) in enumerate(zip(guides, models, strict=True))
    ]
    posterior = Posterior(models[0], fitted, lineage, parts["columns"], priors, first_priors)
    return posterior.replace(learnt_rows=rows)


def _of_components(priors: Sequence[Any], count: int, network: RandomPEFT) -> list[Any]:
    """The prior of each component, where the network is."""
    here = [moved(prior, lambda value: value.to(network.device)) for prior in priors]
    return here * count if len(here) == 1 else here


def _check_fixed(model: Model, saved: Mapping[str, Tensor]) -> None:
    """Refuse a user's own prior that does not hold the sites fixed that the saved one held, at the
    same values."""
    fixed = held_fixed(model.prior, model.sites) if saved else {}
    for name, value in saved.items():
        now = fixed.get(name)
        if now is None or not torch.allclose(now.cpu().to(value), value):
            raise SaveError(
                f"prior: this posterior was saved with {name!r} held fixed at "
                f"{value.tolist()!r:.80}; got {None if now is None else now.tolist()!r:.80}"
            )


def read_report(folder: Path) -> FitReport:
    """The report of a saved posterior's last round, or a SaveError if there is none."""
    reports = _reports(folder, read_plain(folder))
    if not reports:
        raise SaveError(f"path: {folder} holds a posterior of no round")
    return reports[-1]


def _reports(folder: Path, plain: Plain) -> list[FitReport]:
    with _reading(folder, "lineage"):
        reports = unpack(plain["lineage"], "lineage", {})
        if not all(isinstance(report, FitReport) for report in reports):
            raise TypeError("expected reports")
        return [*reports]


def read_lineage(folder: Path, plain: Plain) -> tuple[FitReport, ...]:
    """The reports in a file, and those of earlier rounds in the folders beside it."""
    reports = _reports(folder, plain)
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
        if parent in {report.id for report in reports}:
            raise SaveError(f"path: {folder} continues round {parent} twice")
        reports = [*earlier, *reports]
    return tuple(reports)
