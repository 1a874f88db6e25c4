"""Plain numbers in place of NumPy's, which JSON cannot hold."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

__all__ = ["make_plain"]


def make_plain(config: Any) -> None:
    """Replace NumPy's numbers among the fields of a dataclass, frozen or not, by Python's.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     rank: int
    ...     def __post_init__(self) -> None:
    ...         make_plain(self)
    >>> Config(np.int64(8))
    Config(rank=8)
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())
