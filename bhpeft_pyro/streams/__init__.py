"""Data that keep coming: streams of batches, drift, and the history of rounds."""

from .batches import by_count, by_period
from .drift import Drift, Signal, assess
from .history import History
from .record import Record
from .stream import prequential, stream

__all__ = [
    "Drift",
    "History",
    "Record",
    "Signal",
    "assess",
    "by_count",
    "by_period",
    "prequential",
    "stream",
]
