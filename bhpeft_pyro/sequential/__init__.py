"""Updating in rounds: forgetting, replay, new labels, drift, history, streams."""

from . import figures, transfer
from .batches import by_count, by_period
from .drift import Drift, Signal, assess
from .forgetting import Forgetting
from .growth import grow
from .history import History
from .projection import projected
from .record import Record
from .replay import Replay
from .stream import prequential, stream

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
