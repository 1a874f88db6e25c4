"""Posteriors on disk: safetensors for tensors, JSON for the rest, never a pickle.

The index names the tensor file by its digest and is replaced last and at once, so a crash at any
moment leaves the folder with the old posterior or the new one, whole.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import likelihoods, peft
from .data import Columns, stored
from .errors import SaveError
from .files import FORMAT, INDEX, exists, index_of, lineage_of, read_index, read_tensors, write
from .guides import GUIDES, BlockGuide, Guide
from .head import Head, OwnHead
from .inference.draws import seeded
from .inference.report import FitReport
from .model import Model
from .network import RandomPEFT, fingerprint
from .priors import Prior, PriorLike
from .priors import stored as stored_priors

if TYPE_CHECKING:
    from .posterior import Coreset, Posterior

__all__ = ["backbone_name", "load", "save"]

P = TypeVar("P", bound="Posterior")
_GUIDES: dict[str, Callable[..., Guide]] = {**GUIDES, "blocks": BlockGuide}


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
    model, guide = posterior.model, posterior.guide
    name = next((name for name, cls in _GUIDES.items() if type(guide) is cls), None)
    if name is None or not isinstance(guide, Guide):
        raise SaveError(
            f"guide: {type(guide).__name__} cannot be saved; guides that can: {', '.join(_GUIDES)}"
        )
    prior, tensors = stored_priors.describe(model.prior, "prior")
    first: dict[str, Any] | None = None  # the same
    if posterior.first_prior is not model.prior:
        first, more = stored_priors.describe(posterior.first_prior, "first_prior")
        tensors |= more
    coreset, more = _describe_coreset(posterior.coreset)
    tensors |= more
    parts = {"guide": guide, "network": model.network}
    for part, module in parts.items():
        tensors |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
    # A guide that has learnt nothing since it became a prior shares its tensors with that.
    data = dump_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    new = f"posterior-{digest[:16]}.safetensors"
    reports = posterior.lineage
    known = [i for i, r in enumerate(reports) if not alone and exists(folder.with_name(r.id))]
    reports = reports[max(known, default=-1) + 1 :]
    content = {
        "format": FORMAT,
        "tensors": {"file": new, "sha256": digest},
        "backbone": {
            "fingerprint": fingerprint(model.network.backbone),
            "name": model.network.backbone.config._name_or_path,
        },
        "kinds": [_describe(kind) for kind in model.network.kinds],
        "head": _describe(model.network.head),
        "aligned": model.network.coordinates is not None,
        "likelihood": _describe(model.likelihood),
        "prior": prior,
        "first_prior": first,
        "coreset": coreset,
        "guide": name,
        "guide_options": guide.options(),
        "text": asdict(posterior.text),
        "lineage": [report.to_json() for report in reports],
    }
    text = index_of(content)
    folder.mkdir(parents=True, exist_ok=True)
    old = {file.name for file in folder.glob("posterior-*.safetensors")}
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
    cls: type[P],
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
) -> P:
    """Read a posterior; see `Posterior.load`."""
    from .posterior import TextOptions

    content = read_index(folder)
    try:
        tensors = read_tensors(folder / content["tensors"]["file"], content["tensors"]["sha256"])
        kinds = tuple(_revive(peft, kind) for kind in content["kinds"])
        head: Head | OwnHead = _revive_head(content["head"])
        aligned = bool(content["aligned"])
        likelihood = _revive(likelihoods, content["likelihood"])
        text = dict(content["text"])
        text["columns"] = Columns(**text["columns"])
        text["label_names"] = text["label_names"] and tuple(text["label_names"])
        lineage = lineage_of(folder, content)
        options = TextOptions(**text)
        guide_class = _GUIDES[content["guide"]]
        guide_options = content.get("guide_options", {})
        fitted_on = content["backbone"]
        own_prior, first_prior = _priors(content, tensors, prior)
    except (KeyError, TypeError, AttributeError) as error:
        raise SaveError(f"path: {folder / INDEX} lacks or has unknown parts: {error}") from error
    if fingerprint(backbone) != fitted_on["fingerprint"]:
        raise SaveError(
            f"backbone: this posterior was fitted on another one "
            f"({fitted_on['name'] or 'unnamed'!r}); its weights differ from those of "
            f"{backbone.config._name_or_path or 'the one given'!r}"
        )
    model = Model(RandomPEFT(backbone, kinds, head, tokenizer, aligned), own_prior, likelihood)
    with seeded(0):  # its starting values don't matter, the global random state does
        guide = guide_class(model, **guide_options)
    try:
        for part, module in {"guide": guide, "network": model.network}.items():
            module.load_state_dict(_within(tensors, part))
        guide.follow(model)  # whose sites' units are those saved with the network
        coreset = _revive_coreset(content.get("coreset"), tensors, guide)
    except (RuntimeError, KeyError, TypeError) as error:
        raise SaveError(f"path: {folder} does not go with this model: {error}") from error
    return cls(model, guide, lineage, options, first_prior, coreset)


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


def _priors(
    content: dict[str, Any], tensors: dict[str, Tensor], given: PriorLike | None
) -> tuple[Prior, Prior | None]:
    """The round's prior and the first round's.

    What is given stands for one of the user's own; the first may go without.
    """
    now, first = content["prior"], content.get("first_prior")
    prior = stored_priors.revive(now, tensors, "prior", given)
    if first is None:
        return prior, prior
    if first["kind"] == "custom" and (given is None or now["kind"] == "custom"):
        return prior, None
    return prior, stored_priors.revive(first, tensors, "first_prior", given)


def _describe_coreset(coreset: Coreset | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    if coreset is None:
        return None, {}
    examples, parts = stored.describe(coreset.examples)
    tensors = {f"coreset.examples.{name}": value for name, value in parts.items()}
    state = coreset.guide.state_dict()
    tensors |= {f"coreset.guide.{name}": value for name, value in state.items()}
    return {"examples": examples, "report": coreset.report.to_json()}, tensors


def _revive_coreset(
    description: dict[str, Any] | None, tensors: dict[str, Tensor], guide: nn.Module
) -> Coreset | None:
    """`guide` is that of the whole posterior: the coreset's is of the same family."""
    from .posterior import Coreset

    if description is None:
        return None
    examples = stored.revive(description["examples"], _within(tensors, "coreset.examples"))
    core = copy.deepcopy(guide)
    core.load_state_dict(_within(tensors, "coreset.guide"))
    return Coreset(examples, core, FitReport.from_json(description["report"]))


def _within(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
