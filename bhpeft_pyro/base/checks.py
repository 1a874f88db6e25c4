"""What messages show, warnings, and libraries that not everybody has."""

from __future__ import annotations

import os
import re
import reprlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ..errors import BHPEFTWarning, ConfigError, DataError

_WIDTH = 60  # characters of a value in a message
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
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


_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".ods", ".db", ".sqlite")
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


def warn(message: str | BHPEFTWarning) -> None:
    """Give a warning at the line that called this package: one of the same line is shown once."""
    frame, level = sys._getframe(1), 2
    within = ("bhpeft_pyro", "contextlib", "pyro", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BHPEFTWarning, stacklevel=level)


Extra = Literal["mlflow", "peft", "ray", "serve", "sheets"]
_USES: dict[Extra, str] = {
    "mlflow": "models of MLflow",
    "peft": "adapters of the peft library",
    "ray": "tasks on Ray",
    "serve": "pages and services",
    "sheets": "spreadsheets",
}


def optional_library(name: str, extra: Extra) -> Any:
    """The module `name` of a library that not everybody has, imported when it is needed.

    Raises:
        ConfigError: it is missing; the message names the extra that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{_USES[extra]} need {name}: pip install 'bhpeft_pyro[{extra}]'"
        ) from error
