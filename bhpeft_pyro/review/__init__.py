"""People label the texts that a posterior doubts, in a page on this machine."""

from .journal import Decision, Journal, labelled
from .learning import Learning, State, Where
from .page import application
from .pool import Item, Pool
from .session import Agreement, Progress, Session

__all__ = [  # noqa: RUF022 - in the order of use
    "Pool",
    "Item",
    "Journal",
    "Decision",
    "labelled",
    "Session",
    "Progress",
    "Agreement",
    "Learning",
    "Where",
    "State",
    "application",
]
