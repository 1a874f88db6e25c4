"""Updating in rounds: forgetting, replay, new labels, drift, history, streams."""

from .batches import by_count, by_period
from .drift import Drift, Signal, assess
from .growth import grow
from .history import History
from .record import Record, transfer
from .stream import prequential, stream

__all__ = [
    "Drift",
    "History",
    "Record",
    "Signal",
    "assess",
    "by_count",
    "by_period",
    "grow",
    "prequential",
    "stream",
    "transfer",
]
