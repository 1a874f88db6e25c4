"""Names that functions and the program's options share, and patterns of site names.

What the names stand for is slow to import; this module is not. Of patterns, as in
`{"lora.*.B": ..., "*": ...}`, the first that matches applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

from ..errors import BHPEFTError, ConfigError

Task = Literal["classes", "labels", "ratings", "choices"]
"""The uses of a table."""

Preset = Literal["adapter", "bh_peft", "head_only", "lora", "mam", "prefix", "unipelt"]
"""Functions of `peft.presets`."""

Family = Literal["laplace", "normal"]
"""Guides whose posterior can be the prior of a next round."""

GuideName = Literal["laplace", "normal", "delta", "down only", "A only"]
"""Families, the point estimate, and presets that keep some weights at a point."""

Method = Literal["student", "exact"]
"""How a forecast is made (`Posterior.predict`)."""

Period = Literal["day", "week", "month", "quarter", "year"]
"""How long a batch of a stream may be."""


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern that applies to a name, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def matching(names: Iterable[str], patterns: str | Iterable[str], argument: str) -> list[str]:
    """The names that match one of the patterns, in their order."""
    names = [*names]
    patterns = [patterns] if isinstance(patterns, str) else [*patterns]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{argument}: {pattern!r} matches no site; sites: {', '.join(names)}")
    return [name for name in names if first_match(name, patterns) is not None]


def sort_by_pattern(
    names: Iterable[str], patterns: Iterable[str], argument: str, error: type[BHPEFTError]
) -> dict[str, str]:
    """For each site name the pattern that applies. It is an error if none applies to a name, or a
    pattern to no name; `argument` is the one that gave the patterns."""
    names, patterns = [*names], [*patterns]
    pattern_of: dict[str, str] = {}
    for name in names:
        if (pattern := first_match(name, patterns)) is None:
            raise error(
                f"{argument}: no pattern matches the site {name!r}; patterns: "
                f"{', '.join(map(repr, patterns)) or 'none'}"
            )
        pattern_of[name] = pattern
    check_used(names, patterns, argument, error)
    return pattern_of


def check_used(
    names: Iterable[str], patterns: Iterable[str], argument: str, error: type[BHPEFTError]
) -> None:
    """Refuse patterns that apply to no name, because misspelt or behind an earlier pattern."""
    names = [*names]
    unused = set(patterns) - {first_match(name, patterns) for name in names}
    if unused:
        listed = ", ".join(repr(pattern) for pattern in patterns if pattern in unused)
        raise error(
            f"{argument}: {listed} match no site that an earlier pattern doesn't; sites: "
            f"{', '.join(names)}"
        )
