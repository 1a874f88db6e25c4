"""Objects as plain data, which JSON can hold, and tensors; and back.

Numbers, str, lists, and dicts with str as keys are themselves. All else is an object with a "$":

    {"$": "tensor"}                  a tensor, whose name says where it is: "priors.0.normal.loc"
    {"$": "tuple", "of": [...]}      a tuple; "dict" has pairs of any keys
    {"$": "LoRA", "rank": 2, ...}    an object of a class in `KNOWN`, by what makes it again; of a
                                     guide the options and the state
    {"$": "own", "path": ..., ...}   code of a user's own by its import path, with its options

A file can name no class but those in `KNOWN`. Nothing is imported by a name in a file: whoever
loads it passes code of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pyro.distributions as dist
from pyro.distributions.constraints import ordered_vector
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from .. import guides
from ..base.distributions import Constrained, Covariance, LowRankNormal
from ..base.fit_options import FitOptions
from ..base.isolation import seeded
from ..base.user_code import own_code, path_of
from ..data import Columns
from ..decisions.novelty import Novelty
from ..decisions.promises import Promise
from ..errors import KEEP_TENSORS, GuideError, SaveError
from ..guides import Guide, as_guide, latents
from ..model import likelihoods
from ..model.head import ClassifierHead, Head
from ..model.likelihoods import Function, Likelihood
from ..model.model import Model
from ..peft import Adapter, LoRA, Prefix
from ..prediction.log_kernel import LogKernel
from ..prediction.student import Student, StudentReport
from ..priors import (
    FunctionSpaceNormal,
    Hierarchical,
    JointPrior,
    PosteriorPrior,
    PriorLike,
    as_prior,
)
from ..priors.any_prior import in_words
from ..training.report import FitReport

Plain = dict[str, Any]
Tensors = dict[str, Tensor]

_DATACLASSES: tuple[Any, ...] = (
    *(LoRA, Adapter, Prefix, Head, ClassifierHead, Columns, FitOptions, FitReport),
    *(likelihoods.Categorical, likelihoods.MultiLabel, likelihoods.MultipleChoice),
    *(likelihoods.OrderedLogistic, likelihoods.Function, likelihoods.Normal),
    *(likelihoods.HeteroscedasticNormal, likelihoods.StudentT),
    *(FunctionSpaceNormal, Hierarchical, Covariance),
    *(Student, StudentReport, LogKernel, Promise, Novelty),
)
KNOWN: dict[str, tuple[Any, tuple[str, ...]]] = {
    **{cls.__name__: (cls, tuple(f.name for f in fields(cls) if f.init)) for cls in _DATACLASSES},
    "PosteriorPrior": (PosteriorPrior, ("distributions", "structure")),
    "JointPrior": (JointPrior, ("normal", "shapes", "name", "open")),
    "LowRankNormal": (LowRankNormal, ("loc", "covariance")),
    "dist.Normal": (dist.Normal, ("loc", "scale")),
    "dist.Independent": (dist.Independent, ("base_dist", "reinterpreted_batch_ndims")),
    "Constrained": (Constrained, ("base_dist", "support")),
    "independent": (constraints.independent, ("base_constraint", "reinterpreted_batch_ndims")),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
    "simplex": (type(constraints.simplex), ()),
    "lower_cholesky": (type(constraints.lower_cholesky), ()),
    "corr_cholesky": (type(constraints.corr_cholesky), ()),
    "ordered_vector": (type(ordered_vector), ()),
    "LaplaceGuide": (guides.LaplaceGuide, ()),
    "MeanFieldGuide": (guides.MeanFieldGuide, ()),
    "DrawsGuide": (guides.DrawsGuide, ()),
    "PyroGuide": (guides.PyroGuide, ()),
}
"""The classes that a file can name, with the attributes that make an object of each again: of
dataclasses by their names, of others in their order. Guides are made of a model and options."""

_NAMES = {cls: name for name, (cls, _) in KNOWN.items()}
_VARIABLE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def pack(x: Any, at: str, tensors: Tensors, own: bool = False) -> Any:
    """Plain data of an object, whose tensors are added to `tensors`.

    Args:
        x: the object.
        at: what it is in, which begins the names of its tensors.
        tensors: by name.
        own: whether it may be, or have in it, code of the user's own.

    Raises:
        SaveError: names the part that cannot be saved.
    """
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Tensor):
        if at in tensors:
            raise SaveError(f"{at}: two tensors have this name; expected others")
        # Clones: a guide and the prior made from it may share tensors, which safetensors refuses.
        tensors[at] = x.detach().cpu().contiguous().clone()
        return {"$": "tensor"}
    if isinstance(x, list):
        return [pack(value, _inside(at, n), tensors, own) for n, value in enumerate(x)]
    if isinstance(x, tuple):
        return {"$": "tuple", "of": pack([*x], at, tensors, own)}
    if isinstance(x, Mapping):
        if any(not isinstance(key, str) or key == "$" for key in x):
            return {"$": "dict", "of": pack([[*pair] for pair in x.items()], at, tensors, own)}
        return {key: pack(value, _inside(at, key), tensors, own) for key, value in x.items()}
    if isinstance(x, Guide):
        return _pack_guide(x, at, tensors)
    if (name := _NAMES.get(type(x))) is not None:
        parts = {attribute: getattr(x, attribute) for attribute in KNOWN[name][1]}
        return {"$": name, **pack(parts, at, tensors, own)}
    if own and isinstance(x, Likelihood):
        names = [f.name for f in fields(x) if f.init] if is_dataclass(x) else vars(x)
        options = {name: getattr(x, name) for name in names}
        _check_made_again("likelihood", type(x), options)
        plain = pack(options, _inside(at, "options"), tensors)
        return {"$": "own", "path": path_of(x), "options": plain}
    if own and callable(x) and not isinstance(x, Distribution):
        return {"$": "own", "path": path_of(x), "words": in_words(x)}
    raise SaveError(
        f"{at}: a {type(x).__name__} cannot be saved; expected None, numbers, truth values, str, "
        f"tensors, and tuples, lists and dicts of these. {KEEP_TENSORS}"
    )


def _pack_guide(guide: Guide, at: str, tensors: Tensors) -> Plain:
    try:
        options = guide.options()
    except GuideError as error:
        raise SaveError(f"guide: {error}") from error
    name = _NAMES.get(type(guide))
    if name is None:
        _check_made_again("guide", guide.source, options, None)
    kind = {"$": name} if name else {"$": "own", "path": path_of(guide.source)}
    return kind | pack({"options": options, "state": guide.state_dict()}, at, tensors)


def _check_made_again(what: str, code: Any, options: Mapping[str, Any], *outer: object) -> None:
    """Refuse what `code(*outer, **options)` could not make again as it was."""
    try:
        signature = inspect.signature(code)
        bound = signature.bind(*outer, **options).arguments
        named = [p.name for p in signature.parameters.values() if p.kind not in _VARIABLE]
        left = [name for name in named if name not in bound]
        if isinstance(code, type) and left:  # a default may be another value
            raise TypeError(f"missing a value for {', '.join(left)}")
    except (TypeError, ValueError) as error:
        raise SaveError(
            f"{what}: {code.__name__} cannot be saved, as it cannot be made again from "
            f"{sorted(options)}: {error}; expected all arguments by name, in options() of a guide, "
            "and as the attributes of a likelihood"
        ) from error


def unpack(plain: Any, at: str, tensors: Tensors, own: Callable[..., Any] | None = None) -> Any:
    """The inverse of `pack`. Parts that are missing or of other types are any of several errors.

    Args:
        plain: the plain data.
        at: as for `pack`.
        tensors: by name; each is taken out when it is used.
        own: gives the user's own code for what the file says of it; None if there can be none.
    """
    if isinstance(plain, list):
        return [unpack(value, _inside(at, n), tensors, own) for n, value in enumerate(plain)]
    if not isinstance(plain, dict):
        return plain
    kind = plain.get("$")
    if kind == "tensor":
        return tensors.pop(at)
    if kind in ("tuple", "dict"):
        return {"tuple": tuple, "dict": dict}[kind](unpack(plain["of"], at, tensors, own))
    inner = own if kind != "own" else None  # options have no code of the user's own
    parts = {
        key: unpack(value, _inside(at, key), tensors, inner)
        for key, value in plain.items()
        if key != "$"
    }
    if kind is None:
        return parts
    if kind == "own" and own is not None:
        return own(**parts)
    make, attributes = _known(kind, at)
    by_name = is_dataclass(make)
    return make(**parts) if by_name else make(*(parts[name] for name in attributes))


def _known(kind: object, at: str) -> tuple[Any, tuple[str, ...]]:
    if not isinstance(kind, str) or kind not in KNOWN:
        raise SaveError(f"path: {at}: {kind!r:.60} is unknown here")
    return KNOWN[kind]


def unpack_guide(plain: Plain, at: str, tensors: Tensors, model: Model, given: object) -> Guide:
    """The guide of a model that was saved; `given` is a user's own."""
    parts = unpack({key: plain[key] for key in ("options", "state")}, at, tensors)
    options, state = parts["options"], parts["state"]
    if plain["$"] == "own":
        source = given.source if isinstance(given, Guide) else given
        make = own_code("guide", plain["path"], source)
        if not isinstance(make, type):
            make, options = lambda _: as_guide(source), {}
    else:
        make, _ = _known(plain["$"], at)
        _check_numbers(make, options, state, model, at)
    with seeded(0):  # initial values are replaced; the global random state stays
        guide = make(model, **options)
    if not isinstance(guide, Guide):
        raise SaveError(f"path: {at}: expected a guide, got a {type(guide).__name__}")
    load_state(guide, state, at)
    guide.set_prior(model)
    return guide


def _check_numbers(
    make: object, options: Plain, state: Mapping[str, Tensor], model: Model, at: str
) -> None:
    """Refuse a guide for which the file has too few numbers, before it is made."""
    each = 1
    if make is not guides.LaplaceGuide:  # whose directions come with its state
        sizes = [options.get(size) or 1 for size in ("samples", "rank", "num_transforms")]
        each = max(*sizes, *(options.get("hidden_dim") or ()))
    needed = sum(latent.loc.numel() for latent in latents(model)) * each
    room = sum(value.numel() for value in state.values())
    if needed > room:
        raise SaveError(f"path: {at}: it needs {needed} numbers, and the file has {room}")


def load_state(module: nn.Module, state: Mapping[str, Tensor], at: str) -> None:
    """Load tensors into a module; a SaveError if they do not fit."""
    for name, value in module.state_dict().items():
        if name in state and state[name].dtype != value.dtype:
            raise SaveError(f"path: {at}.{name} is {state[name].dtype}; expected {value.dtype}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise SaveError(f"path: {at} does not fit this model: {error}") from error


def has_own(plain: Any) -> bool:
    """Whether code of a user's own is a part of plain data."""
    if isinstance(plain, dict):
        return plain.get("$") == "own" or any(map(has_own, plain.values()))
    return isinstance(plain, list) and any(map(has_own, plain))


def own_prior(given: PriorLike | None, path: str, words: str) -> Any:
    """The prior that was given for the one that a file names."""
    prior = own_code("prior", path, None if given is None else as_prior(given))
    if (now := in_words(prior)) != words:
        raise SaveError(f"prior: this posterior was saved with {words!s:.200}; got {now:.200}")
    return prior


def own_likelihood(given: object, path: str, options: Plain | None = None, words: str = "") -> Any:
    """The likelihood of the class that was given for the one that a file names, with the options
    that were saved; or the function of a `Function`."""
    code: Any = given.function if isinstance(given, Function) else given
    code = own_code("likelihood", path, code)
    code = type(code) if isinstance(code, Likelihood) else code
    return code(**(options or {})) if isinstance(code, type) else code


def _inside(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)
