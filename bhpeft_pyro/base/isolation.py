"""What one thread does must not change what another one gets, nor the caller's state.

Pyro's handlers and store, torch's random state and the truncation of fast tokenizers belong to the
whole process. So whatever runs a Pyro function, sets the random state or tokenises holds one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices that have it
_LOCK = threading.Condition()  # a thread may take it again within its own block


@contextmanager
def locked() -> Iterator[None]:
    """Only one thread at a time is in such a block; the others wait until it ends."""
    with _LOCK:
        yield


def wait_for(future: Future[Any]) -> None:
    """Wait without the lock, which the future's own thread may need."""

    def wake(_: object) -> None:
        with _LOCK:
            _LOCK.notify_all()

    with _LOCK:
        future.add_done_callback(wake)
        _LOCK.wait_for(future.done)


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
    """`locked`, and torch's random state is restored at the end."""
    with locked(), torch.random.fork_rng(range(torch.cuda.device_count())):
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
    with locked(), torch.no_grad(), without_autocast(), own_parameters(), poutine.block():
        yield
