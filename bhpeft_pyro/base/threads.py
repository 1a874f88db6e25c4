"""Turns of threads: Pyro's handlers, its store, torch's random state and the truncation of fast
tokenizers are shared by all of them.

Whatever runs a Pyro function, sets the random state or tokenises does so inside one of the blocks
below. Long work inside them calls `give_way` between its steps.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyro
import torch
from pyro import poutine
from pyro.poutine import runtime

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices that have it
_FORK = 5.0  # seconds that a fork waits at the door, and then for its turn

_FITS = threading.RLock()
_TURN, _DOOR = threading.Lock(), threading.Lock()  # who waits for a turn holds the door


class _Shared:
    """A copy of what threads share, as it is now."""

    def __init__(self) -> None:
        # Handlers leave Pyro's stack only by their own `with` blocks; `clear` of a store makes new
        # dicts, so the old ones need no copies.
        self.handlers = [*runtime._PYRO_STACK]
        self.dims = [*runtime._DIM_ALLOCATOR._stack]
        self.store = {**vars(pyro.get_param_store())}
        self.settings = pyro.settings.get()  # validation among them
        self.random = torch.get_rng_state()
        self.on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back(self) -> None:
        runtime._PYRO_STACK[:] = self.handlers
        runtime._DIM_ALLOCATOR._stack[:] = self.dims
        vars(pyro.get_param_store()).update(self.store)
        pyro.settings.set(**self.settings)
        torch.set_rng_state(self.random)
        if self.on_gpus:
            torch.cuda.set_rng_state_all(self.on_gpus)


class _Mine(threading.local):
    """Of each thread, what was there when its turn began; None if it is not its turn."""

    before: _Shared | None = None
    forking: bool = False  # in a turn of its own


_MINE = _Mine()


def _begin(timeout: float = -1) -> bool:
    """Wait for a turn; whether it came in time."""
    if not _DOOR.acquire(timeout=timeout):
        return False
    try:
        began = _TURN.acquire(timeout=timeout)
    finally:
        _DOOR.release()
    if began:
        try:
            _MINE.before = _Shared()
        except BaseException:  # too little memory for a copy of the random state
            _TURN.release()
            raise
    return began


def _end() -> None:
    _MINE.before = None
    _TURN.release()


@contextmanager
def sampling() -> Iterator[None]:
    """A turn: only one thread at a time samples or tokenises."""
    if _MINE.before is not None:
        yield
        return
    _begin()
    try:
        yield
    finally:
        _end()


@contextmanager
def fitting() -> Iterator[None]:
    """A turn for one fit at a time, as fits set the coordinates of a network. Others may take turns
    whenever it gives way."""
    with _away():
        _FITS.acquire()
    try:
        with sampling():
            yield
    finally:
        _FITS.release()


def give_way() -> None:
    """If another thread waits for a turn, let it have one, between two steps of long work. It finds
    what threads share as it was before this turn, and leaves this thread's own as it is."""
    if _DOOR.locked():
        with _away():
            pass


@contextmanager
def _away() -> Iterator[None]:
    """Outside the turn that this thread has, if it has one."""
    if (before := _MINE.before) is None:
        yield
        return
    mine = _Shared()
    before.put_back()
    _end()
    try:
        yield
    finally:
        try:
            _begin()
        except BaseException:  # Ctrl-C; the blocks around this one end in a turn all the same
            _begin()
            raise
        finally:
            mine.put_back()


@contextmanager
def unlocked() -> Iterator[None]:
    """Inside `fitting`, let other threads sample and fit while this one waits for them."""
    with _away():
        _FITS.release()
        try:
            yield
        finally:
            _FITS.acquire()


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients are there even if the caller has turned them off, which each thread does alone, and
    they are in full precision even if the caller has turned autocast on."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """The caller's autocast is off: `bf16=` decides what is computed in bfloat16, which has too few
    digits to resolve narrow directions of a covariance."""
    with ExitStack() as off:
        for device in filter(torch.is_autocast_enabled, _AUTOCAST):
            off.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """`sampling`, and torch's random state is restored at the end."""
    with sampling(), torch.random.fork_rng(range(torch.cuda.device_count())):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's random state to `seed`, and restore it at the end."""
    with undisturbed():
        torch.manual_seed(seed)
        yield


@contextmanager
def own_parameters() -> Iterator[None]:
    """An empty store of Pyro's, and the caller's again at the end: in one store, parameters of the
    same names are the same parameters. (`scope` of the store would take away the attribute
    `unconstrained`, which SVI reads after a call.)"""
    store = pyro.get_param_store()
    before = {**vars(store)}
    store.clear()  # makes new dicts
    try:
        yield
    finally:
        vars(store).update(before)


@contextmanager
def alone() -> Iterator[None]:
    """Run Pyro in one thread, without gradients, autocast, outer handlers or global parameters."""
    with sampling(), torch.no_grad(), without_autocast(), own_parameters(), poutine.block():
        yield


# A child of `os.fork` has this thread only. What another one was doing never ends there: its locks
# stay held (torch has some of its own, such as that of `manual_seed`), its handlers in force. So a
# fork is a turn; but after a while, another thread may be waiting for the fork itself.


def _before_fork() -> None:
    _MINE.forking = _MINE.before is None and _begin(_FORK)


def _after_fork() -> None:
    if _MINE.forking:
        _end()


def _after_fork_in_child() -> None:
    global _FITS, _TURN, _DOOR
    if not _FITS.acquire(blocking=False):
        _FITS = threading.RLock()
    else:  # nobody's, or this thread's own
        _FITS.release()
    _TURN, _DOOR = threading.Lock(), threading.Lock()
    if _MINE.forking:
        _MINE.before = None
    elif _MINE.before is not None:
        _TURN.acquire()
    else:
        runtime._PYRO_STACK.clear()
        runtime._DIM_ALLOCATOR._stack.clear()
        pyro.enable_validation(__debug__)  # a fit turns it off; this is Pyro's default


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
