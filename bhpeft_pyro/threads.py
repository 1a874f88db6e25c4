"""Turns of threads: Pyro's handlers, its store, torch's random state and the truncation of fast
tokenizers are shared by all of them.

Whatever runs a Pyro function, sets the random state or tokenises does so inside one of the blocks
below.
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

_LOCK = threading.RLock()


def _forget_other_threads() -> None:
    """In a forked process, end what a thread was doing that held the lock and does not exist here.

    Its lock would never be released, and its Pyro handlers would act on every later sample.
    """
    global _LOCK
    if _LOCK.acquire(blocking=False):  # nobody's, or this thread's own
        _LOCK.release()
        return
    _LOCK = threading.RLock()
    # Private, but handlers leave Pyro's stack only by the `with` blocks of the lost thread.
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack.clear()
    pyro.enable_validation(__debug__)  # a fit turns it off; this is Pyro's default


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def sampling() -> Iterator[None]:
    """Lock what threads share, so that only one at a time samples or tokenises."""
    with _LOCK:
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients are there even if the caller has turned them off, which each thread does alone, and
    they are in full precision even if the caller has turned autocast on."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """The caller's autocast is off: `bf16=` decides what is computed in bfloat16."""
    with ExitStack() as off:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            off.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def unlocked() -> Iterator[None]:
    """Inside `sampling`, let other threads sample while this one waits for them."""
    _LOCK.release()
    try:
        yield
    finally:
        _LOCK.acquire()


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
def alone() -> Iterator[None]:
    """Run Pyro in one thread, without gradients, autocast, outer handlers or global parameters."""
    with (
        sampling(),
        torch.no_grad(),
        without_autocast(),
        pyro.get_param_store().scope(),
        poutine.block(),
    ):
        yield
