"""People label the texts that a posterior doubts, in a page on this machine."""

from .journal import Decision, Journal, labelled
from .page import application
from .pool import Item, Pool
from .session import Session

__all__ = ["Decision", "Item", "Journal", "Pool", "Session", "application", "labelled"]
