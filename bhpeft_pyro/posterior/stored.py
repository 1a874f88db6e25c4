"""A posterior as plain data and tensors, for a saved one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import peft
from ..data import Columns
from ..data import examples as stored
from ..errors import KEEP_TENSORS, GuideError, SaveError
from ..guides import GUIDES, BlockGuide, Guide, PyroGuide
from ..inference.draws import seeded
from ..inference.report import FitReport
from ..model import head, likelihoods
from ..model.head import Head, OwnHead
from ..model.model import Model
from ..model.network import RandomPEFT, fingerprint
from ..priors import MixturePrior, Prior, PriorLike
from ..priors import stored as stored_priors

if TYPE_CHECKING:
    from .posterior import Coreset, Posterior

__all__ = [
    "check_savable",
    "describe",
    "revive",
]


_GUIDES: dict[str, Callable[..., Guide]] = {**GUIDES, "blocks": BlockGuide, "pyro": PyroGuide}
_READY: dict[str, Sequence[type]] = {
    "kinds": (peft.LoRA, peft.Adapter, peft.Prefix),
    "head": (Head, OwnHead),
    "likelihood": [
        getattr(likelihoods, name) for name in likelihoods.__all__ if name != "Likelihood"
    ],
}

Lineage = tuple[FitReport, ...]


def check_savable(model: Model) -> None:
    """See that a model is made of this package's own parts, which alone can be made again.

    Raises:
        SaveError: a kind, the head or the likelihood is none of them.
    """
    parts: list[tuple[str, object]] = [("kinds", kind) for kind in model.network.kinds]
    parts += [("head", model.network.head), ("likelihood", model.likelihood)]
    for what, part in parts:
        if type(part) not in _READY[what]:
            ready = ", ".join(cls.__name__ for cls in _READY[what])
            raise SaveError(
                f"{what}: {type(part).__name__} cannot be saved; expected one of {ready}. "
                f"{KEEP_TENSORS}"
            )


def describe(posterior: Posterior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A posterior, but for its lineage, as plain data and tensors.

    Raises:
        SaveError: the guide, a prior or a part of the model cannot be described.
    """
    from .mixture import MixturePosterior

    model = posterior.model
    check_savable(model)
    fitted: dict[str, Any]
    tensors: dict[str, Tensor] = {}
    if isinstance(posterior, MixturePosterior):
        fits = []
        for number, component in enumerate(posterior.components):
            fit, more = _describe_fit(component, f"{number}.")
            fits.append(fit)
            tensors |= more
        fitted = {"components": fits, "own_priors": posterior.own_priors}
    else:
        fitted, tensors = _describe_fit(posterior, "")
    prior, more = stored_priors.describe(model.prior, "prior")
    tensors |= more
    first: dict[str, Any] | None = None  # the same
    parts = posterior.components if isinstance(posterior, MixturePosterior) else (posterior,)
    firsts: list[Any] = [each.first_prior for each in parts]
    own = any(each is not firsts[0] for each in firsts)
    if any(each.first_prior is not each.model.prior for each in parts):
        whole = MixturePrior(firsts) if own else firsts[0]
        first, more = stored_priors.describe(whole, "first_prior")
        tensors |= more
    tensors |= _named("network", model.network)
    return {
        "backbone": {
            "fingerprint": fingerprint(
                model.network.backbone, isinstance(model.network.head, OwnHead)
            ),
            "name": model.network.backbone.config._name_or_path,
        },
        "kinds": [_describe(kind) for kind in model.network.kinds],
        "head": _describe(model.network.head),
        "likelihood": _describe(model.likelihood),
        "prior": prior,
        "first_prior": first,
        "own_first_priors": own,
        **fitted,
        "columns": asdict(posterior.columns),
    }, tensors


def revive(
    content: dict[str, Any],
    tensors: dict[str, Tensor],
    lineage: Lineage,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    given: PriorLike | None,
) -> Posterior:
    """The posterior that was described.

    Args:
        content, tensors: as `describe` gives them.
        lineage: the reports of its rounds.
        backbone: the one it was fitted on.
        tokenizer: as for `RandomPEFT`.
        given: the prior that stands for one of the user's own.

    Raises:
        SaveError: another backbone, a prior needed, or tensors that do not go with the rest.
        KeyError, TypeError, AttributeError: parts are missing or unknown.
    """
    from .mixture import MixturePosterior
    from .posterior import Posterior

    tensors = {  # examples stay where data are
        name: value if ".examples." in f".{name}" else value.to(backbone.device)
        for name, value in tensors.items()
    }
    kinds = tuple(_revive(peft, kind) for kind in content["kinds"])
    top: Head | OwnHead = _revive(head, content["head"])
    likelihood = _revive(likelihoods, content["likelihood"])
    columns = Columns(**content["columns"])
    fits = content.get("components")
    for fit in fits or [content]:
        _GUIDES[fit["guide"]]  # a KeyError, if unknown
    prior, first_prior = _priors(content, tensors, given)
    fitted_on = content["backbone"]
    if fingerprint(backbone, isinstance(top, OwnHead)) != fitted_on["fingerprint"]:
        raise SaveError(
            f"backbone: this posterior was fitted on another one "
            f"({fitted_on['name'] or 'unnamed'!r}); its weights differ from those of "
            f"{backbone.config._name_or_path or 'the one given'!r}"
        )
    network = RandomPEFT(backbone, kinds, top, tokenizer)
    _load(network, tensors, "network")

    def fitted(
        fit: dict[str, Any], part: str, prior: Prior, first: Prior | None, rounds: Lineage
    ) -> Posterior:
        model = Model(network, prior, likelihood)
        guide, coreset = _revive_fit(fit, tensors, part, model)
        return Posterior(model, guide, rounds, columns, first, coreset)

    if fits is None:
        return fitted(content, "", prior, first_prior, lineage)

    def each(whole: Any, own: bool) -> Sequence[Any]:
        return whole.parts if own and isinstance(whole, MixturePrior) else [whole] * len(fits)

    priors = each(prior, content["own_priors"])
    firsts = each(first_prior, content.get("own_first_priors", False))
    rounds = [tuple(report.components[number] for report in lineage) for number in range(len(fits))]
    components = [
        fitted(fit, f"{number}.", *own)
        for number, (fit, *own) in enumerate(zip(fits, priors, firsts, rounds, strict=True))
    ]
    return MixturePosterior(components, lineage)


def _describe_fit(posterior: Posterior, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What components have each of its own: the guide and a coreset."""
    guide = posterior.guide
    name = next((name for name, cls in _GUIDES.items() if type(guide) is cls), None)
    if name is None or not isinstance(guide, Guide):
        raise SaveError(
            f"guide: {type(guide).__name__} cannot be saved; expected one that autoguide makes by "
            f"name. {KEEP_TENSORS}"
            + ("; or update(guide='normal') first" if isinstance(guide, Guide) else "")
        )
    try:
        options = guide.options()
    except GuideError as error:
        raise SaveError(f"guide: {error}") from error
    coreset, tensors = _describe_coreset(posterior.coreset, part)
    tensors |= _named(f"{part}guide", guide)
    return {"coreset": coreset, "guide": name, "guide_options": options}, tensors


def _revive_fit(
    fit: dict[str, Any], tensors: dict[str, Tensor], part: str, model: Model
) -> tuple[Guide, Coreset | None]:
    with seeded(0):  # its starting values don't matter, the global random state does
        guide = _GUIDES[fit["guide"]](model, **fit.get("guide_options", {}))
    _load(guide, tensors, f"{part}guide")
    guide.follow(model)
    return guide, _revive_coreset(fit.get("coreset"), tensors, part, guide)


def _describe_coreset(
    coreset: Coreset | None, part: str
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    if coreset is None:
        return None, {}
    examples, parts = stored.describe(coreset.examples)
    tensors = {f"{part}coreset.examples.{name}": value for name, value in parts.items()}
    tensors |= _named(f"{part}coreset.guide", coreset.guide)
    return {"examples": examples, "report": coreset.report.to_json()}, tensors


def _revive_coreset(
    description: dict[str, Any] | None, tensors: dict[str, Tensor], part: str, guide: nn.Module
) -> Coreset | None:
    """`guide` is that of the whole posterior: the coreset's is of the same family."""
    from .posterior import Coreset

    if description is None:
        return None
    examples = stored.revive(description["examples"], _within(tensors, f"{part}coreset.examples"))
    core = copy.deepcopy(guide)
    _load(core, tensors, f"{part}coreset.guide")
    return Coreset(examples, core, FitReport.from_json(description["report"]))


def _named(part: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


def _load(module: nn.Module, tensors: dict[str, Tensor], part: str) -> None:
    try:
        module.load_state_dict(_within(tensors, part))
    except RuntimeError as error:
        raise SaveError(f"path: its {part} does not go with this model: {error}") from error


def _within(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _describe(thing: Any) -> dict[str, Any]:
    return {"class": type(thing).__name__, **asdict(thing)}


def _revive(module: Any, description: dict[str, Any]) -> Any:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    name = str(fields.pop("class"))
    if name not in module.__all__:  # only our own classes, never any name in a file
        raise SaveError(f"path: the saved posterior uses {name!r}, which {module.__name__} lacks")
    return getattr(module, name)(**fields)


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
