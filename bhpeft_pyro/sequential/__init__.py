"""Updating in rounds: forgetting, replay, new labels, drift, history, streams."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from . import record as transfer
from .batches import by_count, by_period
from .drift import Drift, Signal, assess
from .forgetting import Forgetting
from .growth import grow
from .history import History
from .record import Record
from .stream import prequential, stream
from .update import Replay

if TYPE_CHECKING:
    from . import figures

__all__ = [
    "Drift",
    "Forgetting",
    "History",
    "Record",
    "Replay",
    "Signal",
    "assess",
    "by_count",
    "by_period",
    "figures",
    "grow",
    "prequential",
    "projected",
    "stream",
    "transfer",
]


def __getattr__(name: str) -> ModuleType:
    """`figures`, once it is asked for: Matplotlib is slow to import."""
    if name == "figures":
        return import_module(f"{__name__}.figures")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
