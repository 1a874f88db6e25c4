"""Names that functions and the program's options share, and patterns of site names.

What the names stand for is slow to import; this module is not. Of patterns, as in
`{"lora.*.B": ..., "*": ...}`, the first that matches applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from ..errors import BHPEFTError, ConfigError
from .checks import string

Task = Literal["classes", "labels", "words", "ratings", "choices"]
"""What a table may be used for."""

Preset = Literal["adapter", "bh_peft", "head_only", "lora", "mam", "prefix", "unipelt"]
"""Functions of `peft.presets`."""

Family = Literal["laplace", "normal"]
"""Guides whose posterior can be the prior of a next round."""

GuideName = Literal["laplace", "normal", "delta", "down only", "A only"]
"""These, the point estimate, and presets that keep some weights at a point."""

Period = Literal["day", "week", "month", "quarter", "year"]
"""How long a batch of a stream may be."""


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern that applies to a name, or None.

    >>> first_match("lora.query.B", ["*.A", "lora.*", "*"])
    'lora.*'
    """
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def matching(names: Iterable[str], patterns: str | Iterable[str], argument: str) -> list[str]:
    """The names that match one of the patterns, in their order.

    >>> matching(["head.bias", "lora.query.A"], "lora.*", "sites")
    ['lora.query.A']
    """
    names = [*names]
    try:
        given: list[Any] = [patterns] if isinstance(patterns, str) else [*patterns]
    except TypeError:
        given = [patterns]  # which is no str, as the rule says
    patterns = [string(argument, pattern) for pattern in given]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{argument}: {pattern!r} matches no site; sites: {', '.join(names)}")
    return [name for name in names if first_match(name, patterns) is not None]


def sort_by_pattern(
    names: Iterable[str], patterns: Iterable[str], argument: str, error: type[BHPEFTError]
) -> dict[str, str]:
    """For each site name the pattern that applies. It is an error if none applies to a name, or a
    pattern to no name; `argument` is the one that gave the patterns.

    >>> sort_by_pattern(["head.bias", "lora.query.A"], ["head.*", "*"], "prior", BHPEFTError)
    {'head.bias': 'head.*', 'lora.query.A': '*'}
    """
    names, patterns = [*names], [*patterns]
    found: dict[str, str] = {}
    for name in names:
        pattern = first_match(name, patterns)
        if pattern is None:
            raise error(
                f"{argument}: no pattern matches the site {name!r}; patterns: "
                f"{', '.join(map(repr, patterns)) or 'none'}"
            )
        found[name] = pattern
    check_used(names, patterns, argument, error)
    return found


def check_used(
    names: Iterable[str], patterns: Iterable[str], argument: str, error: type[BHPEFTError]
) -> None:
    """Refuse patterns that apply to no name, because misspelt or behind an earlier pattern."""
    names, patterns = [*names], [*patterns]
    used = {first_match(name, patterns) for name in names}
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise error(
            f"{argument}: {', '.join(map(repr, unused))} match no site that an earlier pattern "
            f"doesn't; sites: {', '.join(names)}"
        )
