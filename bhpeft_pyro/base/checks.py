"""Checks of plain arguments: a value as Python's own, or an error that says what was expected.

A rule is called with the name of an argument and its value. It accepts NumPy's numbers, which JSON
cannot hold, and gives Python's in their place.

>>> import numpy as np
>>> COUNT("epochs", np.int64(3))
3
>>> COUNT("epochs", 1.5)
Traceback (most recent call last):
    ...
bhpeft_pyro.errors.ConfigError: epochs=1.5 must be an integer of at least 1
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import BHPEFTError, BHPEFTWarning, ConfigError, DataError

Rule = Callable[..., Any]

_WIDTH = 60  # characters of a value in a message
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENDS: dict[str, tuple[str, Rule]] = {
    "least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
_hints = cache(get_type_hints)
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _WIDTH


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and short."""
    try:
        text = " ".join(_REPR.repr(value).split())
    except Exception:  # of a class that is not ours, or an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def few(texts: Sequence[str], most: int = 12, mark: str = ", ", more: str = " and {} more") -> str:
    """The first texts, with a mark between them, and how many more there are."""
    left = len(texts) - most
    return mark.join(texts[:most]) + (more.format(left) if left > 0 else "")


def harmless(text: str) -> str:
    """The text with what would control a terminal, or cannot be printed, written out."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Number:
    """The rule for a finite number; truth values and arrays are refused.

    Attributes:
        least, most: the ends of its range, both allowed.
        above, below: the same, not allowed.
        whole: whether it is an integer.
        none: whether None is allowed.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    none: bool = False

    def __str__(self) -> str:
        range_ = " and ".join(f"{words} {end:n}" for words, _, end in self._ends())
        kind = "an integer" if self.whole else "a finite number"
        return f"{kind} {range_}".rstrip() + ", or None" * self.none

    def __call__(self, name: str, value: Any, error: type[BHPEFTError] = ConfigError) -> Any:
        if value is None and self.none:
            return None
        number, kind = value, numbers.Integral if self.whole else numbers.Real
        if not isinstance(number, bool) and isinstance(number, kind):
            try:
                plain: Any = int(number) if self.whole else float(number)  # type: ignore[call-overload]
            except OverflowError:
                plain = math.inf
            holds = all(compare(plain, end) for _, compare, end in self._ends())
            if holds and (self.whole or math.isfinite(plain)):
                return plain
        raise error(f"{name}={shown(value)} must be {self}")

    def _ends(self) -> Iterator[tuple[str, Rule, float]]:
        for name, (words, compare) in _ENDS.items():
            if (end := getattr(self, name)) is not None:
                yield words, compare, end


COUNT = Number(least=1, whole=True)
MAYBE_COUNT = Number(least=1, whole=True, none=True)
SAMPLES = Number(least=0, whole=True)
_LAST_SEED = 2**62
_STRIDE = 1000  # between seeds that are derived from neighbouring ones
SEED = Number(least=0, most=_LAST_SEED, whole=True)
POSITIVE = Number(above=0)
MAYBE_POSITIVE = Number(above=0, none=True)
SHARE = Number(least=0, most=1)
INSIDE = Number(above=0, below=1)
BELOW_ONE = Number(least=0, below=1)


def boolean(name: str, value: object, error: type[BHPEFTError] = ConfigError) -> bool:
    """The rule for a truth value."""
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        return bool(value)
    raise error(f"{name}={shown(value)} must be True or False")


def string(name: str, value: object, error: type[BHPEFTError] = ConfigError) -> str:
    """The rule for a str."""
    if isinstance(value, str):
        return value
    raise error(f"{name}={shown(value)} must be a str")


_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".ods")
_LONGEST = 255  # characters of a file's name


def data_file(source: str | Path) -> Path | None:
    """The file of a data set; None for a name on the hub.

    Raises:
        DataError: there is no such file, or it is of another kind.
    """
    path = Path(source)
    if path.suffix.lower() in _SUFFIXES:
        if not os.path.isfile(path):  # Path.is_file raises for a text too long for a name
            hint = " (a single text goes in a list)" if len(path.name) > _LONGEST else ""
            raise DataError(f"{source}: no such file{hint}")
        return path
    if isinstance(source, Path) or os.path.exists(path):  # of a folder, all would be read
        raise DataError(f"{shown(str(source))}: expected a file {', '.join(_SUFFIXES)}")
    return None


def as_path(name: str, value: object, error: type[BHPEFTError] = ConfigError) -> Path:
    """The rule for a path."""
    if isinstance(value, str | Path) and "\0" not in str(value):
        return Path(value)
    raise error(f"{name}={shown(value)} must be a path, a str or a Path")


def strings(name: str, values: Any, error: type[BHPEFTError] = ConfigError) -> tuple[str, ...]:
    """The rule for a sequence of str."""
    if type(values).__module__ == "numpy":  # which is slow to import
        values = values.tolist()  # which is no list if it has no dimensions
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise error(f"{name}={shown(values)}; expected a sequence of str")
    return tuple(string(name, value, error) for value in values)


def one_of(*choices: str) -> Rule:
    """The rule for one of some str."""

    def rule(name: str, value: object, error: type[BHPEFTError] = ConfigError) -> Any:
        if isinstance(value, str) and value in choices:
            return value
        raise error(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}")

    return rule


def derived(seed: int, number: int = 0) -> int:
    """A seed that was computed from another, for a function that checks it as `SEED`. Those of
    seeds 0, 1, 2, ... and different numbers are different ones."""
    return (seed + _STRIDE * number) % (_LAST_SEED + 1)


def check(value: object, types: Any, name: str, expected: str) -> None:
    """Raise ConfigError unless `value` is one of `types`."""
    if not isinstance(value, types):
        raise ConfigError(f"{name}: expected {expected}, got {shown(value)}")


def check_fields(
    config: Any, rules: Mapping[str, Rule], where: str = "", error: type[BHPEFTError] = ConfigError
) -> None:
    """Check fields of a dataclass, frozen or not, and make their values plain. In messages `where`
    comes before their names."""
    for name, rule in rules.items():
        label = f"{where}: {name}" if where else name
        object.__setattr__(config, name, rule(label, getattr(config, name), error))


def shallow(value: Any, depth: int) -> bool:
    """Whether lists, dicts and arrays of objects lie no more than `depth` deep in each other."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        if str(getattr(value, "dtype", "")) != "object":
            return True
        value = value.ravel().tolist()
    return depth > 0 and all(shallow(inner, depth - 1) for inner in value)


def check_types(config: Any) -> None:
    """Raise TypeError unless the fields of a dataclass have their types. Integers are numbers."""
    kind: Any = type(config)
    for name, hint in _hints(kind).items():
        if not _fits(value := getattr(config, name), hint):
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
            raise TypeError(f"{name}={value!r:.100}; expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    if not (of := get_args(hint)):
        if isinstance(value, bool):
            return hint is bool
        return isinstance(value, int | float if hint is float else hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in of)
    kind: Any = get_origin(hint)
    if not isinstance(value, kind):
        return False
    if isinstance(value, dict):
        return all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    return all(_fits(entry, of[0]) for entry in value)


def warn(message: str | BHPEFTWarning) -> None:
    """Give a warning at the line that called this package: one of the same line is shown once."""
    frame, level = sys._getframe(1), 2
    within = ("bhpeft_pyro", "contextlib", "pyro", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BHPEFTWarning, stacklevel=level)


def optional_library(name: str, why: str) -> Any:
    """The module `name` of a library that not everybody has, imported when it is needed.

    Raises:
        ConfigError: it is missing; `why` says for what it is needed, and how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(why) from error
