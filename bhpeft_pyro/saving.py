"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

`posterior.json` names the tensor file by its digest and is replaced last and at once, so a crash
at any moment leaves the folder with the old posterior or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyro.distributions as dist
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import likelihoods, peft
from .data import Columns
from .errors import SaveError
from .guides import GUIDES
from .head import Head, OwnHead
from .inference.draws import seeded
from .inference.report import FitReport
from .model import Model
from .network import RandomPEFT, fingerprint
from .priors import FunctionSpaceNormal, PosteriorPrior, PriorLike

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["backbone_name", "exists", "load", "save", "write"]

FORMAT = 1
INDEX = "posterior.json"
P = TypeVar("P", bound="Posterior")


def save(posterior: Posterior, folder: Path, overwrite: bool) -> Path:
    """Write a posterior into `folder`; see `Posterior.save`."""
    index = folder / INDEX
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"path: {folder} is a file; expected a folder, or the name of a new one")
    if index.exists() and not overwrite:
        raise SaveError(f"path: {folder} holds a posterior already; pass overwrite=True to replace")
    model, guide = posterior.model, posterior.guide
    name = next((name for name, cls in GUIDES.items() if type(guide) is cls), None)
    if name is None:
        raise SaveError(
            f"guide: {type(guide).__name__} cannot be saved; guides that can: {', '.join(GUIDES)}"
        )
    prior, tensors = _describe_prior(model.prior)
    parts = {"guide": guide, "network": model.network}
    for part, module in parts.items():
        tensors |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
    data = dump_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    content = {
        "format": FORMAT,
        "tensors": {"file": f"posterior-{digest[:16]}.safetensors", "sha256": digest},
        "backbone": {
            "fingerprint": fingerprint(model.network.backbone),
            "name": model.network.backbone.config._name_or_path,
        },
        "kinds": [_describe(kind) for kind in model.network.kinds],
        "head": _describe(model.network.head),
        "aligned": model.network.coordinates is not None,
        "likelihood": _describe(model.likelihood),
        "prior": prior,
        "guide": name,
        "text": asdict(posterior.text),
        "lineage": [report.to_json() for report in posterior.lineage],
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
    cls: type[P],
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
) -> P:
    """Read a posterior; see `Posterior.load`."""
    from .posterior import TextOptions

    content = _read_index(folder / INDEX)
    try:
        tensors = _read_tensors(folder / content["tensors"]["file"], content["tensors"]["sha256"])
        kinds = tuple(_revive(peft, kind) for kind in content["kinds"])
        head: Head | OwnHead = _revive_head(content["head"])
        aligned = bool(content["aligned"])
        likelihood = _revive(likelihoods, content["likelihood"])
        text = dict(content["text"])
        text["columns"] = Columns(**text["columns"])
        text["label_names"] = text["label_names"] and tuple(text["label_names"])
        lineage = tuple(FitReport.from_json(report) for report in content["lineage"])
        options = TextOptions(**text)
        guide_class = GUIDES[content["guide"]]
        fitted_on = content["backbone"]
        if prior is None:
            prior = _revive_prior(content["prior"], tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error
    if fingerprint(backbone) != fitted_on["fingerprint"]:
        raise SaveError(
            f"backbone: this posterior was fitted on another one "
            f"({fitted_on['name'] or 'unnamed'!r}); its weights differ from those of "
            f"{backbone.config._name_or_path or 'the one given'!r}"
        )
    model = Model(RandomPEFT(backbone, kinds, head, tokenizer, aligned), prior, likelihood)
    with seeded(0):  # its starting values don't matter, the global random state does
        guide = guide_class(model)
    try:
        for part, module in {"guide": guide, "network": model.network}.items():
            prefix = f"{part}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
    except RuntimeError as error:
        raise SaveError(f"path: {folder} does not go with this model: {error}") from error
    return cls(model, guide, lineage, options)


def _describe(thing: Any) -> dict[str, Any]:
    return {"class": type(thing).__name__, **asdict(thing)}


def _revive(module: Any, description: dict[str, Any]) -> Any:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    name = str(fields.pop("class"))
    if name not in module.__all__:  # only our own classes, never any name in a file
        raise SaveError(f"path: the saved posterior uses {name!r}, which {module.__name__} lacks")
    return getattr(module, name)(**fields)


def _revive_head(description: dict[str, Any]) -> Head | OwnHead:
    from . import head

    return _revive(head, description)


def _describe_prior(prior: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prior as plain data and tensors; one of the user's own by its import path."""
    if isinstance(prior, FunctionSpaceNormal):
        return {"kind": "function-space", **asdict(prior)}, {}
    if isinstance(prior, PosteriorPrior):
        tensors = {}
        for name, site in prior.distributions.items():
            base = getattr(site, "base_dist", site)
            if not isinstance(base, dist.Normal):
                return {"kind": "custom", "path": f"a posterior with {type(site).__name__}"}, {}
            tensors[f"prior.{name}.loc"], tensors[f"prior.{name}.scale"] = base.loc, base.scale
        # The order of sites is the order of draws: with it, a seed means the same after loading.
        return {"kind": "posterior", "sites": list(prior.distributions)}, tensors
    named = prior if hasattr(prior, "__qualname__") else type(prior)
    return {"kind": "custom", "path": f"{named.__module__}:{named.__qualname__}"}, {}


def _revive_prior(description: dict[str, Any], tensors: dict[str, Tensor]) -> PriorLike:
    fields = dict(description)
    kind = fields.pop("kind")
    if kind == "function-space":
        return FunctionSpaceNormal(**fields)
    if kind == "posterior":
        return PosteriorPrior(
            {
                name: dist.Normal(
                    tensors[f"prior.{name}.loc"], tensors[f"prior.{name}.scale"]
                ).to_event(tensors[f"prior.{name}.loc"].dim())
                for name in fields["sites"]
            }
        )
    if kind == "custom":
        raise SaveError(
            f"prior: this posterior was fitted under {fields['path']!r}; pass prior=..."
        )
    raise SaveError(f"prior: the saved posterior's is of an unknown kind, {kind!r}")


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
