"""Threads: predictions run beside a fit, fits one after the other.

Pyro keeps its stack of effect handlers and its parameters in globals, torch its random state. So
one thread at a time may sample. Running the network under weights that are drawn needs neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fitting", "let_others", "sampling"]

_FITS = threading.RLock()
_PYRO = threading.Condition(threading.RLock())
_PAUSE = 1e-4  # seconds, in which whoever waits wakes up


@contextmanager
def sampling() -> Iterator[None]:
    """Pyro and the random state to oneself."""
    with _PYRO:
        yield


@contextmanager
def fitting() -> Iterator[None]:
    """The same, but between steps (`let_others`), and no other fit even then."""
    with _FITS, _PYRO:
        yield


def let_others() -> None:
    """Within `sampling`, at a moment at which it does no harm, let other threads have a turn."""
    _PYRO.wait(_PAUSE)
