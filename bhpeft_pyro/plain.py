"""Plain data from a file, against the types that a dataclass declares."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["check_types"]


def check_types(config: Any) -> None:
    """Check that the fields of a dataclass have the types that it declares. Integers are numbers.

    Raises:
        TypeError: one has another.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     name: str
    ...     scales: dict[str, float] | None = None
    >>> check_types(Config("one", {"a": 1}))
    >>> check_types(Config("one", {"a": "1"}))
    Traceback (most recent call last):
        ...
    TypeError: scales={'a': '1'}; expected dict[str, float] | None
    """
    kind: Any = type(config)
    for name, hint in _hints(kind).items():
        if not _fits(value := getattr(config, name), hint):
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
            raise TypeError(f"{name}={value!r:.100}; expected {expected}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    if not (of := get_args(hint)):
        if isinstance(value, bool):
            return hint is bool
        return isinstance(value, int | float if hint is float else hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in of)
    kind: Any = get_origin(hint)
    if not isinstance(value, kind):
        return False
    if isinstance(value, dict):
        return all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    return all(_fits(each, of[0]) for each in value)
