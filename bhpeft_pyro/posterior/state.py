"""A posterior as plain data and tensors, and back.

The same protocol as for examples (`data.examples`) and priors (`priors.prior_state`): `describe`
returns plain data, which JSON can hold, and a dict of tensors; `revive` makes the object of both.
Priors, likelihoods and guides of a user's own are described by their import paths (`own`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import peft
from ..base.threads import seeded
from ..base.user_code import check_plain, given_for, path_of
from ..data import Columns
from ..data import examples as stored_examples
from ..errors import KEEP_TENSORS, GuideError, SaveError
from ..guides import GUIDES, BlockGuide, DrawsGuide, Guide, PyroGuide, as_guide, latents
from ..model import likelihoods
from ..model.backbone import check_identity, check_outputs, identity, saved_name
from ..model.head import ClassifierHead, Head, with_tail
from ..model.likelihoods import Function, Likelihood
from ..model.model import Model
from ..model.network import RandomPEFT
from ..priors import MixturePrior, Prior, PriorLike, prior_state
from ..training.report import FitReport
from .mixture import MixturePosterior
from .posterior import Posterior
from .replay import Coreset

_GUIDES: dict[str, Callable[..., Guide]] = {
    **GUIDES,
    "blocks": BlockGuide,
    "draws": DrawsGuide,
    "pyro": PyroGuide,
}
_KNOWN: dict[str, Sequence[type]] = {
    "kinds": (peft.LoRA, peft.Adapter, peft.Prefix),
    "head": (Head, ClassifierHead),
    "likelihood": [
        getattr(likelihoods, name)
        for name in likelihoods.__all__
        if name not in ("Function", "Likelihood")
    ],
}

_COUNTS = ("rank", "size", "length", "encoder", "outputs", "levels")  # with weights for each

Plain = dict[str, Any]
Tensors = dict[str, Tensor]


def check_savable(model: Model) -> None:
    """Refuse PEFT kinds and heads of a user's own, and a likelihood that cannot be described."""
    parts: list[tuple[str, object]] = [("kinds", kind) for kind in model.network.kinds]
    for what, part in [*parts, ("head", model.network.head)]:
        if type(part) not in _KNOWN[what]:
            known = ", ".join(cls.__name__ for cls in _KNOWN[what])
            raise SaveError(
                f"{what}: {type(part).__name__} cannot be saved; expected one of {known}. "
                f"{KEEP_TENSORS}"
            )
    describe_likelihood(model.likelihood)


def own_likelihood(model: Model) -> Likelihood | None:
    """The likelihood if it is a user's own, so that `load` needs it again."""
    known = type(model.likelihood) in _KNOWN["likelihood"]
    return None if known else model.likelihood


def describe(posterior: Posterior) -> tuple[Plain, Tensors]:
    """A posterior without its lineage. Raises a SaveError if a part cannot be described."""
    network, parts = posterior.model.network, posterior.components
    check_savable(posterior.model)
    mixture = parts[0] is not posterior
    tail = network.head.tail(network.backbone)
    tensors = _state("network", network) | {f"tail.{name}": each for name, each in tail.items()}
    fits = []
    for number, part in enumerate(parts):
        fit, more = _describe_fit(part, f"{number}." if mixture else "")
        fits.append(fit)
        tensors |= more
    prior = MixturePrior.of([part.model.prior for part in parts])
    first_prior = MixturePrior.of([part.first_prior for part in parts])
    described, more = prior_state.describe(prior, "prior")
    tensors |= more
    first: Plain | None = None  # in the first round it is the prior above
    if any(part.first_prior is not part.model.prior for part in parts):
        first, more = prior_state.describe(first_prior, "first_prior")
        tensors |= more
    plain: Plain = {
        "backbone": {
            **identity(network.backbone),
            "outputs": network.fixed_outputs(),
            "name": saved_name(network.backbone),
            "tokenizer": network.probe(),
        },
        "kinds": [_describe(kind) for kind in network.kinds],
        "head": _describe(network.head),
        "likelihood": describe_likelihood(posterior.model.likelihood),
        "prior": described,
        "first_prior": first,
        "own_first_priors": first_prior is not parts[0].first_prior,
        "columns": asdict(posterior.columns),
    }
    if not mixture:
        return plain | fits[0], tensors
    own_priors = prior is not parts[0].model.prior
    return plain | {"components": fits, "own_priors": own_priors}, tensors


def revive(
    plain: Plain,
    tensors: Tensors,
    lineage: tuple[FitReport, ...],
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prior: PriorLike | None,
    likelihood: object = None,
    guide: object = None,
) -> Posterior:
    """The posterior that was described, with the reports of its rounds.

    Raises:
        SaveError: the backbone is another one, code of the user's own is needed or is not what was
            saved, or tensors do not fit.
        KeyError, TypeError, AttributeError: parts are missing or unknown.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise SaveError(f"path: its tensor {name!r} is not finite; expected a whole file")
    tensors = {  # examples stay on the CPU
        name: value if ".examples." in f".{name}" else value.to(backbone.device)
        for name, value in tensors.items()
    }
    kinds = tuple(_revive("kinds", kind) for kind in plain["kinds"])
    top: Head | ClassifierHead = _revive("head", plain["head"])
    labels = _revive_likelihood(plain["likelihood"], likelihood)
    columns = Columns(**plain["columns"])
    mixture = "components" in plain
    fits: list[Plain] = plain["components"] if mixture else [plain]
    makers = [_maker(fit["guide"], guide) for fit in fits]
    priors, firsts = _revive_priors(plain, tensors, prior, len(fits))
    fitted_on = plain["backbone"]
    check_identity(backbone, fitted_on)
    _check_room((*kinds, top, labels), tensors, backbone)
    if tail := _part(tensors, "tail"):
        backbone = with_tail(backbone, tail)
    network = RandomPEFT(backbone, kinds, top, tokenizer)
    probes = fitted_on.get("tokenizer"), network.probe()
    if None not in probes and probes[0] != probes[1]:
        raise SaveError("tokenizer: this posterior was fitted with another one; expected that")
    check_outputs(backbone, network.fixed_outputs(), fitted_on)
    _load(network, tensors, "network")
    network.in_use = True
    found = []
    for number, fit in enumerate(fits):
        model = Model(network, priors[number], labels)
        prefix = f"{number}." if mixture else ""
        fitted, coreset = _revive_fit(fit, tensors, prefix, model, makers[number])
        rounds = tuple(r.components[number] for r in lineage) if mixture else lineage
        found.append(Posterior(model, fitted, rounds, columns, firsts[number], coreset))
    return MixturePosterior(found, lineage) if mixture else found[0]


def _check_room(parts: Sequence[object], tensors: Tensors, backbone: PreTrainedModel) -> None:
    """Refuse sizes, such as ranks, for which the file has too few weights, before anything of that
    size is made."""
    room = sum(value.numel() for value in tensors.values())
    width = getattr(backbone.config, "hidden_size", 1)
    known = {each for some in _KNOWN.values() for each in some}
    for part in (each for each in parts if type(each) in known):
        for name in _COUNTS:
            count, of = getattr(part, name, None) or 0, 1 if name == "levels" else width
            if count * of > room:
                raise SaveError(
                    f"path: the saved {type(part).__name__} has {name}={count}, and all of its "
                    f"tensors together only {room} entries"
                )


def _check_guide(name: str, options: Plain, tensors: Tensors, model: Model) -> None:
    """The same for a guide, unless it is a user's own."""
    if name not in _GUIDES:
        return
    room = sum(value.numel() for value in tensors.values())
    shapes = [tuple(latent.loc.shape) for latent in latents(model)]
    count = sum(map(math.prod, shapes))
    size = _GUIDES[name].size(count, shapes, **options)  # type: ignore[attr-defined]
    if (needed := max(count, size.parameters if size else 0)) > room:
        raise SaveError(
            f"path: the saved guide {name!r} has {needed} parameters, and its tensors only {room} "
            "entries"
        )


def _revive_priors(
    plain: Plain, tensors: Tensors, given: PriorLike | None, count: int
) -> tuple[list[Prior], list[Prior | None]]:
    """For each component the round's prior and the first round's; the latter may be unknown."""
    now, first = plain["prior"], plain.get("first_prior")
    prior = prior_state.revive(now, tensors, "prior", given)
    first_prior: Prior | None = prior
    if first is not None:
        # One function is given; a prior that needs another one stays unknown.
        unknown = prior_state.needs_given(first) and (given is None or now["kind"] == "custom")
        first_prior = None if unknown else prior_state.revive(first, tensors, "first_prior", given)

    def each(prior: Any, own: bool) -> list[Any]:
        return [*prior.parts] if own and isinstance(prior, MixturePrior) else [prior] * count

    return (
        each(prior, plain.get("own_priors", False)),
        each(first_prior, plain.get("own_first_priors", False)),
    )


def _describe_fit(part: Posterior, prefix: str) -> tuple[Plain, Tensors]:
    """What each component has of its own: a guide and a coreset."""
    guide = part.guide
    name = next((name for name, cls in _GUIDES.items() if type(guide) is cls), None)
    try:
        options = guide.options()
    except GuideError as error:
        raise SaveError(f"guide: {error}") from error
    if name is None:
        name = path_of(guide.source)
        check_plain("guide", guide.source, options, part.model)
    plain: Plain = {"coreset": None, "guide": name, "guide_options": options}
    tensors = _state(f"{prefix}guide", guide)
    if (coreset := part.coreset) is not None:
        examples, parts = stored_examples.describe(coreset.examples)
        plain["coreset"] = {"examples": examples, "report": asdict(coreset.report)}
        tensors |= {f"{prefix}coreset.examples.{name}": value for name, value in parts.items()}
        tensors |= _state(f"{prefix}coreset.guide", coreset.guide)
    return plain, tensors


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


def _revive_fit(
    plain: Plain, tensors: Tensors, prefix: str, model: Model, make: Callable[..., Guide]
) -> tuple[Guide, Coreset | None]:
    options = plain.get("guide_options", {})
    _check_guide(plain["guide"], options, _part(tensors, f"{prefix}guide"), model)
    with seeded(0):  # initial values are replaced; the global random state stays
        guide = make(model, **options)
    _load(guide, tensors, f"{prefix}guide")
    guide.set_prior(model)
    if (kept := plain.get("coreset")) is None:
        return guide, None
    own = _part(tensors, f"{prefix}coreset.examples")
    core = copy.deepcopy(guide)
    _load(core, tensors, f"{prefix}coreset.guide")
    examples = stored_examples.revive(kept["examples"], own)
    return guide, Coreset(examples, core, FitReport.from_json(kept["report"]))


def _state(part: str, module: nn.Module) -> Tensors:
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


def _load(module: nn.Module, tensors: Tensors, part: str) -> None:
    state = _part(tensors, part)
    for name, own in module.state_dict().items():
        if name in state and state[name].dtype != own.dtype:
            raise SaveError(
                f"path: its tensor '{part}.{name}' is {state[name].dtype}; expected {own.dtype}"
            )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise SaveError(f"path: its {part} does not fit this model: {error}") from error


def _part(tensors: Tensors, part: str) -> Tensors:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _describe(thing: Any) -> Plain:
    return {"class": type(thing).__name__, **asdict(thing)}


def _revive(what: str, plain: Plain) -> Any:
    known = {cls.__name__: cls for cls in _KNOWN[what]}  # never any other name in a file
    if (name := str(plain["class"])) not in known:
        raise SaveError(
            f"path: {what}: {name!r:.60} is unknown; expected one of {', '.join(known)}"
        )
    return known[name](**_options(plain))


def _options(plain: Plain) -> Plain:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "class"}


def describe_likelihood(likelihood: Likelihood) -> Plain:
    """The options of a likelihood, and its name; of a user's own the import path."""
    thing: Any = likelihood
    make = type(thing)
    if make in _KNOWN["likelihood"]:
        return _describe(likelihood)
    options = dict(vars(thing))
    if is_dataclass(thing):
        options = {each.name: getattr(thing, each.name) for each in fields(thing) if each.init}
    if make is Function:  # the function has a path of its own
        thing = options.pop("function")
        check_plain("likelihood", Function, options, thing)
    else:
        check_plain("likelihood", make, options)
    return {"class": path_of(thing), **options}


def _revive_likelihood(plain: Plain, given: object) -> Likelihood:
    code: Any = given.function if isinstance(given, Function) else given
    if ":" not in (name := str(plain["class"])):
        if given is not None:
            given_for("likelihood", f"{likelihoods.__name__}:{name}", code)
        found: Likelihood = _revive("likelihood", plain)
        return found
    code = given_for("likelihood", name, code)
    code = type(code) if isinstance(code, Likelihood) else code
    if isinstance(code, type) and issubclass(code, Likelihood):
        return code(**_options(plain))
    return Function(code, **_options(plain))
