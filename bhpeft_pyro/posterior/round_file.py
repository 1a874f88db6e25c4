"""A posterior as plain data and tensors, and back.

The protocol is that of examples (`data.examples`) and priors (`priors.prior_file`): `to_state`
returns plain data, which JSON can hold, and a dict of tensors; `from_state` makes the object of
both. Priors, likelihoods and guides of a user's own are named by their import paths
(`base.user_code`), and have to be given again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import peft
from ..base.isolation import seeded
from ..base.user_code import check_plain, given_for, path_of
from ..data import Columns
from ..decisions.novelty import Novelty
from ..decisions.promises import Promise
from ..errors import KEEP_TENSORS, GuideError, SaveError
from ..guides import GUIDES, BlockGuide, DrawsGuide, Guide, PyroGuide, as_guide, latents
from ..model import likelihoods
from ..model.backbone import check_identity, check_outputs, fixed_outputs, identity, saved_name
from ..model.head import ClassifierHead, Head, with_tail
from ..model.likelihoods import Function, Likelihood
from ..model.model import Model
from ..model.network import RandomPEFT
from ..prediction.student import Student
from ..priors import Prior, PriorLike, prior_file
from ..priors.any_prior import held_fixed
from ..priors.prior_file import Plain, Tensors, joined
from ..training.report import FitReport
from .posterior import Posterior

_GUIDES: dict[str, Callable[..., Guide]] = {
    **GUIDES,
    "blocks": BlockGuide,
    "draws": DrawsGuide,
    "pyro": PyroGuide,
}
_READY: dict[str, Sequence[type]] = {
    "kinds": (peft.LoRA, peft.Adapter, peft.Prefix),
    "head": (Head, ClassifierHead),
    "likelihood": [
        getattr(likelihoods, name)
        for name in likelihoods.__all__
        if name not in ("Function", "Likelihood")
    ],
}
"""The classes of this package that a file can name, by the part of a model."""

_ATTACHED: dict[str, Any] = {"student": Student, "promised": Promise, "novelty": Novelty}
"""What is beside the components of a posterior, by its attribute."""

_COUNTS = ("rank", "size", "length", "encoder", "outputs", "levels")  # with weights for each


def to_state(posterior: Posterior) -> tuple[Plain, Tensors]:
    """A posterior without its lineage. Raises a SaveError if a part cannot be saved."""
    network, parts = posterior.model.network, posterior.components
    plain = model_to_state(posterior.model)
    plain["backbone"] = {
        **identity(network.backbone),
        "outputs": fixed_outputs(network),
        "name": saved_name(network.backbone),
        "tokenizer": network.probe(),
    }
    plain["columns"] = asdict(posterior.columns)
    tail = network.head.tail(network.backbone)
    tensors = _tensors("network", network) | {f"tail.{name}": value for name, value in tail.items()}
    plain["components"], more = joined(
        _component_to_state(part, f"{number}.") for number, part in enumerate(parts)
    )
    tensors |= more
    priors = list(posterior.priors)
    plain["priors"], more = _priors_to_state(priors, "prior")
    tensors |= more
    if any(map(prior_file.needs_given, plain["priors"])):
        for number, part in enumerate(parts):
            fixed = held_fixed(part.model.prior, part.model.sites)
            tensors |= {f"{number}.fixed.{name}": value for name, value in fixed.items()}
    first_priors = list(posterior.first_priors)
    plain["first_priors"] = None  # in the first round they are the priors
    if any(one is not other for one, other in zip(priors, first_priors, strict=True)):
        plain["first_priors"], more = _priors_to_state(first_priors, "first_prior")
        tensors |= more
    if posterior.learnt_rows is not None:
        tensors["learnt_rows"] = posterior.learnt_rows
    for name in _ATTACHED:
        plain[name] = None
        if (part := getattr(posterior, name)) is not None:
            plain[name], more = part.to_state()
            tensors |= {f"{name}.{key}": value for key, value in more.items()}
    return plain, tensors


def model_to_state(model: Model) -> Plain:
    """The PEFT kinds, the head and the likelihood of a model. Raises a SaveError if the former are
    a user's own, or the latter cannot be made again from its options."""
    return {
        "kinds": [_ready_to_state("kinds", kind) for kind in model.network.kinds],
        "head": _ready_to_state("head", model.network.head),
        "likelihood": likelihood_to_state(model.likelihood),
    }


def likelihood_to_give(model: Model) -> Likelihood | None:
    """The likelihood if it is a user's own, so that `load` needs it again."""
    ready = type(model.likelihood) in _READY["likelihood"]
    return None if ready else model.likelihood


def from_state(
    plain: Plain,
    tensors: Tensors,
    lineage: tuple[FitReport, ...],
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
    likelihood: object = None,
    guide: object = None,
) -> Posterior:
    """The posterior that was saved, with the reports of its rounds. It is a SaveError if backbone,
    tensors or code of the user's own do not fit, and any of several errors if parts are missing."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise SaveError(f"path: its tensor {name!r} is not finite; expected a whole file")
    tensors = {name: value.to(backbone.device) for name, value in tensors.items()}
    kinds = tuple(_ready_from_state("kinds", kind) for kind in plain["kinds"])
    head: Head | ClassifierHead = _ready_from_state("head", plain["head"])
    labels = _likelihood_from_state(plain["likelihood"], likelihood)
    columns = Columns(**plain["columns"])
    makers = [_maker(component["guide"], guide) for component in plain["components"]]
    priors, first_priors = _priors_from_state(plain, tensors, prior, len(makers))
    began_with = [report.prior for report in lineage]
    prior_file.check_needed(plain["priors"] + (plain["first_priors"] or []), began_with, prior)
    fitted_on = plain["backbone"]
    check_identity(backbone, fitted_on)
    _check_room((*kinds, head, labels), tensors, backbone)
    if tail := _part(tensors, "tail"):
        backbone = with_tail(backbone, tail)
    network = RandomPEFT(backbone, kinds, head, tokenizer)
    probes = fitted_on["tokenizer"], network.probe()
    if None not in probes and probes[0] != probes[1]:
        raise SaveError("tokenizer: this posterior was fitted with another one; expected that")
    check_outputs(backbone, fixed_outputs(network), fitted_on)
    _load(network, tensors, "network")
    network.in_use = True
    learnt = tensors.get("learnt_rows")  # files from before there were any have none
    if learnt is not None and (learnt.dtype != torch.int64 or learnt.dim() != 1):
        raise ValueError(f"learnt_rows: {learnt.dtype} of shape {tuple(learnt.shape)}")
    models = [Model(network, prior, labels) for prior in priors]
    guides = [
        _component_from_state(component, tensors, f"{number}.", models[number], makers[number])
        for number, component in enumerate(plain["components"])
    ]
    posterior = Posterior(models[0], guides, lineage, columns, priors, first_priors)
    posterior = posterior.replace(learnt_rows=None if learnt is None else learnt.cpu())
    for name, kind in _ATTACHED.items():
        if (state := plain.get(name)) is not None:
            made = kind.from_state(state, _part(tensors, name), posterior.model)
            posterior = posterior.replace(**{name: made})
    return posterior


def _priors_to_state(priors: Sequence[Prior | None], part: str) -> tuple[list[Plain], Tensors]:
    """The priors of all components: one if it is the same for all."""
    priors = priors[:1] if all(prior is priors[0] for prior in priors) else priors
    return joined(
        prior_file.to_state(prior, f"{part}.{number}") for number, prior in enumerate(priors)
    )


def _priors_from_state(
    plain: Plain, tensors: Tensors, given: PriorLike | None, count: int
) -> tuple[list[Prior], list[Prior | None]]:
    """For each component the round's prior and the first round's; the latter may be unknown."""
    priors = [
        prior_file.from_state(state, tensors, f"prior.{number}", given)
        for number, state in enumerate(plain["priors"])
    ]
    priors = priors if len(priors) > 1 else priors * count
    if plain["first_priors"] is None:
        return priors, [*priors]
    # One function is given; a prior that needs another one stays unknown.
    used = given is None or any(state["kind"] == "custom" for state in plain["priors"])
    first_priors = [
        None
        if used and prior_file.needs_given(state)
        else prior_file.from_state(state, tensors, f"first_prior.{number}", given)
        for number, state in enumerate(plain["first_priors"])
    ]
    return priors, first_priors if len(first_priors) > 1 else first_priors * count


def _check_room(parts: Sequence[object], tensors: Tensors, backbone: PreTrainedModel) -> None:
    """Refuse sizes, such as ranks, for which the file has too few weights, before anything of that
    size is made."""
    room = sum(value.numel() for value in tensors.values())
    width = getattr(backbone.config, "hidden_size", 1)
    ready = {cls for classes in _READY.values() for cls in classes}
    for part in (part for part in parts if type(part) in ready):
        for name in _COUNTS:
            count, weights = getattr(part, name, None) or 0, 1 if name == "levels" else width
            if count * weights > room:
                raise SaveError(
                    f"path: the saved {type(part).__name__} has {name}={count}, and all of its "
                    f"tensors together only {room} entries"
                )


def _component_to_state(part: Posterior, prefix: str) -> tuple[Plain, Tensors]:
    """The guide of a component."""
    guide = part.guide
    name = next((name for name, cls in _GUIDES.items() if type(guide) is cls), None)
    try:
        options = guide.options()
    except GuideError as error:
        raise SaveError(f"guide: {error}") from error
    if name is None:
        name = path_of(guide.source)
        check_plain("guide", guide.source, options, part.model)
    return {"guide": name, "guide_options": options}, _tensors(f"{prefix}guide", guide)


def _component_from_state(
    plain: Plain, tensors: Tensors, prefix: str, model: Model, make: Callable[..., Guide]
) -> Guide:
    """The guide of a component."""
    prior_file.check_fixed(model.prior, model.sites, _part(tensors, f"{prefix}fixed"))
    name, options = plain["guide"], plain["guide_options"]
    if name in _GUIDES:  # refused before it is made, if the file has too few parameters for it
        room = sum(value.numel() for value in _part(tensors, f"{prefix}guide").values())
        needed = sum(latent.loc.numel() for latent in latents(model)) * _least(name, options)
        if needed > room:
            raise SaveError(
                f"path: the saved guide {name!r} has {needed} parameters, and its tensors only "
                f"{room} entries"
            )
    with seeded(0):  # initial values are replaced; the global random state stays
        guide = make(model, **options)
    _load(guide, tensors, f"{prefix}guide")
    guide.set_prior(model)
    return guide


def _least(name: str, options: Plain) -> int:
    """How many numbers a guide keeps for each weight, at least, by its options."""
    if name == "laplace":  # its directions come with its covariance
        return 1
    sizes = [options.get(size) or 1 for size in ("samples", "rank", "num_transforms")]
    return max(*sizes, *(options.get("hidden_dim") or ()))


def _maker(name: str, given: object) -> Callable[..., Guide]:
    """What makes a guide of a model and options: one of the package, or what was given."""
    if ":" not in name:
        if given is not None:
            given_for("guide", path_of(_GUIDES[name]), given)
        return _GUIDES[name]  # an unknown one is a KeyError
    code = given_for("guide", name, given.source if isinstance(given, Guide) else given)
    if isinstance(code, type) and issubclass(code, Guide):
        return code
    return lambda model: as_guide(code)


def _tensors(part: str, module: nn.Module) -> Tensors:
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


def _load(module: nn.Module, tensors: Tensors, part: str) -> None:
    state = _part(tensors, part)
    for name, value in module.state_dict().items():
        if name in state and state[name].dtype != value.dtype:
            raise SaveError(
                f"path: its tensor '{part}.{name}' is {state[name].dtype}; expected {value.dtype}"
            )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise SaveError(f"path: its {part} does not fit this model: {error}") from error


def _part(tensors: Tensors, part: str) -> Tensors:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _ready_to_state(what: str, part: Any) -> Plain:
    if type(part) not in _READY[what]:
        expected = ", ".join(cls.__name__ for cls in _READY[what])
        raise SaveError(
            f"{what}: {type(part).__name__} cannot be saved; expected one of {expected}. "
            f"{KEEP_TENSORS}"
        )
    return {"class": type(part).__name__, **asdict(part)}


def _ready_from_state(what: str, plain: Plain) -> Any:
    classes = {cls.__name__: cls for cls in _READY[what]}  # never any other name in a file
    if (name := str(plain["class"])) not in classes:
        raise SaveError(
            f"path: {what}: {name!r:.60} is unknown; expected one of {', '.join(classes)}"
        )
    return classes[name](**_options(plain))


def _options(plain: Plain) -> Plain:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "class"}


def likelihood_to_state(likelihood: Likelihood) -> Plain:
    """The options of a likelihood, and its name; of a user's own the import path."""
    thing: Any = likelihood
    make = type(thing)
    if make in _READY["likelihood"]:
        return _ready_to_state("likelihood", likelihood)
    options = dict(vars(thing))
    if is_dataclass(thing):
        options = {f.name: getattr(thing, f.name) for f in fields(thing) if f.init}
    if make is Function:  # the function has a path of its own
        thing = options.pop("function")
        check_plain("likelihood", Function, options, thing)
    else:
        check_plain("likelihood", make, options)
    return {"class": path_of(thing), **options}


def _likelihood_from_state(plain: Plain, given: object) -> Likelihood:
    code: Any = given.function if isinstance(given, Function) else given
    if ":" not in (name := str(plain["class"])):
        if given is not None:
            given_for("likelihood", f"{likelihoods.__name__}:{name}", code)
        likelihood: Likelihood = _ready_from_state("likelihood", plain)
        return likelihood
    code = given_for("likelihood", name, code)
    code = type(code) if isinstance(code, Likelihood) else code
    if isinstance(code, type) and issubclass(code, Likelihood):
        return code(**_options(plain))
    return Function(code, **_options(plain))
