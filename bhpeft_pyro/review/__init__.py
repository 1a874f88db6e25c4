"""People label the texts that a posterior doubts, in a page on this machine."""

from .learning import Learning, State, Where
from .page import application
from .pool import Item, Pool
from .session import Agreement, Decision, Progress, Session, Snapshot, labelled

__all__ = [  # noqa: RUF022 - in the order of use
    "Pool",
    "Item",
    "Decision",
    "labelled",
    "Session",
    "Snapshot",
    "Progress",
    "Agreement",
    "Learning",
    "Where",
    "State",
    "application",
]
