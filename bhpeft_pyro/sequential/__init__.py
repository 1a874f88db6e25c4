"""Updating in rounds: forgetting, replay, new labels, drift, history, streams."""

from .forgetting import Forgetting
from .growth import grow
from .replay import Replay

__all__ = [
    "Forgetting",
    "Replay",
    "grow",
]
