"""Code of your own in saved posteriors: a file has its name, and whoever loads it gives the code.

Nothing is imported by a name in a file, so a file cannot choose what runs.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import SaveError


def path_of(thing: object) -> str:
    """The import path of a class or a function; of any other object that of its class.

    >>> path_of(path_of), path_of(3)
    ('bhpeft_pyro.base.user_code:path_of', 'builtins:int')
    """
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def own_code(what: str, path: str, given: object) -> Any:
    """The class or function that was given for the one that a file names.

    Modules may differ: what was `__main__` in a notebook is often moved into a package later.

    Raises:
        SaveError: none was given, or one of another name.
    """
    if given is None:
        raise SaveError(
            f"{what}: this posterior was saved with {path!r:.200}; pass {what}=... (a file names "
            "code, but it never brings or imports any)"
        )
    if path_of(given).split(":")[1] != path.partition(":")[2]:
        raise SaveError(
            f"{what}: this posterior was saved with {path!r:.200}; got {path_of(given)!r}"
        )
    return given


def plain_attributes(thing: object) -> dict[str, Any]:
    """The attributes of an object of the user's own that come back from JSON, as JSON has them;
    none that Python itself or `functools.wraps` sets, such as `__doc__`.

    >>> class Wide:
    ...     def __init__(self):
    ...         self.sds, self.made = (0.5, 1), object()
    >>> plain_attributes(Wide())
    {'sds': [0.5, 1]}
    """
    plain = {
        key: value
        for key, value in getattr(thing, "__dict__", {}).items()
        if _is_plain(value) and not key.startswith("__")
    }
    attributes: dict[str, Any] = json.loads(json.dumps(plain))
    return attributes


def _is_plain(value: object) -> bool:
    """Whether a value comes back from JSON, where tuples are lists."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
