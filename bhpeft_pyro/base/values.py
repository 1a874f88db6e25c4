"""Values that pydantic checks.

NumPy's numbers become Python's, which JSON can hold; a truth value is no number, and a text is none
either. What pydantic refuses is a ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from operator import attrgetter
from re import sub
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import (
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from ..errors import BHPEFTError, ConfigError
from .checks import shown

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_CONFIG = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


def as_python(value: Any) -> Any:
    """Numbers of NumPy and PyTorch as Python's, and arrays as lists; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _as_tuple(value: Any) -> Any:
    value = as_python(value)
    return tuple(value) if isinstance(value, list) else value


_PLAIN, _FINITE = BeforeValidator(as_python), AllowInfNan(False)
_SELF = Parameter("self", Parameter.POSITIONAL_ONLY)
_LAST_SEED = 2**62
_STRIDE = 1000  # between seeds that are derived from neighbouring ones

Whole = Annotated[int, _PLAIN]
Amount = Annotated[int, _PLAIN, Field(ge=0)]
Count = Annotated[int, _PLAIN, Field(ge=1)]
Several = Annotated[int, _PLAIN, Field(ge=2)]
Seed = Annotated[int, _PLAIN, Field(ge=0, le=_LAST_SEED)]
Finite = Annotated[float, _PLAIN, _FINITE]
Positive = Annotated[float, _PLAIN, _FINITE, Field(gt=0)]
Share = Annotated[float, _PLAIN, Field(ge=0, le=1)]
SomeShare = Annotated[float, _PLAIN, Field(gt=0, le=1)]
PartialShare = Annotated[float, _PLAIN, Field(ge=0, lt=1)]
Inside = Annotated[float, _PLAIN, Field(gt=0, lt=1)]
Flag = Annotated[bool, _PLAIN]
Names = Annotated[Sequence[str], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[Whole, ...], BeforeValidator(_as_tuple)]

_TYPES = {name: kind for name, kind in globals().items() if hasattr(kind, "__metadata__")}


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def checked_dataclass(
    cls: type[T] | None = None, *, eq: bool = True, kw_only: bool = False, frozen: bool = True
) -> Any:
    """A dataclass whose values pydantic checks when it is created.

    >>> @checked_dataclass
    ... class Run:
    ...     steps: Count = 10
    >>> Run(step=3)
    Traceback (most recent call last):
        ...
    bhpeft_pyro.errors.ConfigError: step=3: no such option; expected steps
    """
    if cls is None:
        return lambda cls: checked_dataclass(cls, eq=eq, kw_only=kw_only, frozen=frozen)
    made: Any = pydantic.dataclasses.dataclass(
        cls, frozen=frozen, eq=eq, kw_only=kw_only, config=_CONFIG
    )
    names = [f.name for f in sorted(fields(made), key=attrgetter("kw_only"))]
    unchecked = made.__init__

    @wraps(unchecked)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with _refusing(names):
            unchecked(self, *args, **kwargs)

    # Not that of the class, which a dataclass that is derived from it would have too.
    own: Any = __init__
    own.__signature__ = Signature([_SELF, *_readable(made.__signature__)])
    del made.__signature__
    made.__init__ = own
    return made


def checked_call(function: F) -> F:
    """A function whose arguments of this file's types are checked.

    >>> @checked_call
    ... def halves(steps: Count) -> float:
    ...     return steps / 2
    >>> halves(0)
    Traceback (most recent call last):
        ...
    bhpeft_pyro.errors.ConfigError: steps=0: Input should be greater than or equal to 1
    """
    kinds: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        kind, _, optional = hint.partition(" | ")
        if kind in _TYPES:
            kinds[name] = _TYPES[kind] | None if optional else _TYPES[kind]
    names = [*signature(function).parameters]

    def checked(name: str, value: Any) -> Any:
        return valid(kinds[name], name, value) if name in kinds else value

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = (*map(checked, names, args), *args[len(names) :])
        return function(*args, **{name: checked(name, value) for name, value in kwargs.items()})

    own: Any = call
    readable = _readable(signature(function))
    own.__signature__ = signature(function).replace(parameters=readable)
    own.__annotations__ |= {p.name: p.annotation for p in readable if p.name in kinds}
    return own


def _readable(checked: Signature) -> list[Parameter]:
    """The parameters with Python's types in place of the checked ones, as help() shows them."""
    plain = {name: kind.__origin__.__name__ for name, kind in _TYPES.items()}
    plain |= {"Names": "Sequence[str]", "Numbers": "tuple[int, ...]"}

    def readable(hint: Any) -> Any:
        if not isinstance(hint, str):
            return hint
        outer = sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", hint)
        return sub(r"\w+", lambda word: plain.get(word[0], word[0]), outer)

    return [p.replace(annotation=readable(p.annotation)) for p in checked.parameters.values()]


def valid(kind: Any, name: str, value: Any) -> Any:
    """The value of an argument as one of a type, or a ConfigError with the argument's name."""
    with _refusing(name=name):
        return _adapter(kind).validate_python(value)


def derived(seed: int, number: int = 0) -> int:
    """A seed that was computed from another, within the range of `Seed`. Those of seeds 0, 1, 2,
    ... and different numbers are different ones."""
    return (seed + _STRIDE * number) % (_LAST_SEED + 1)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_CONFIG)


@contextmanager
def _refusing(names: Sequence[str] = (), name: str = "") -> Iterator[None]:
    """Within the block pydantic's error is a ConfigError: about a field of these names, or about
    the argument `name`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        own = first.get("ctx", {}).get("error")
        raise (
            own if isinstance(own, BHPEFTError) else ConfigError(_in_words(first, names, name))
        ) from None


def _in_words(problem: Any, names: Sequence[str], name: str) -> str:
    place = [*problem["loc"]]
    if not name and place:
        first = place.pop(0)
        name = names[first] if isinstance(first, int) and first < len(names) else str(first)
    value = f"{name}{''.join(f'[{part!r}]' for part in place)}={shown(problem['input'])}"
    if problem["type"] == "unexpected_keyword_argument":
        near = get_close_matches(name, names, cutoff=0.5) or names
        return f"{value}: no such option; expected {', '.join(near)}"
    return f"{value}: {problem['msg']}"
