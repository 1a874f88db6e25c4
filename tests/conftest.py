"""Every test starts from the same seed and leaves the process as it found it."""

from __future__ import annotations

import os

# Read once, when the libraries are imported. `make` sets them too; here they hold for `pytest`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# Tiny models, and as many processes as processors: more threads only wait for each other. Kernels
# of notebooks and programs that a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from transformers import AttentionInterface, AttentionMaskInterface

# Our attention functions, which are registered once and stay.
OURS = "bhpeft_"

torch.set_num_threads(1)


def _registry(interface: type) -> dict[str, Any]:
    functions = interface._global_mapping
    return {name: value for name, value in functions.items() if not name.startswith(OURS)}


# What a test must leave alone: name, how to read it, how to put it back.
GLOBAL_STATE: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("default device", torch.get_default_device, torch.set_default_device),
    ("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    ("number of threads", torch.get_num_threads, torch.set_num_threads),
    (
        "deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    (
        "autocast",
        lambda: torch.is_autocast_enabled("cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
    ),
    ("Pyro settings", pyro.settings.get, lambda values: pyro.settings.set(**values)),
    (
        "Pyro param store",
        lambda: sorted(pyro.get_param_store().keys()),
        lambda _value: pyro.clear_param_store(),
    ),
    (
        "Pyro effect handlers",
        lambda: list(_PYRO_STACK),
        lambda value: _PYRO_STACK.__setitem__(slice(None), value),
    ),
    (
        "attention functions",
        lambda: _registry(AttentionInterface),
        lambda value: _restore(AttentionInterface, value),
    ),
    (
        "attention mask functions",
        lambda: _registry(AttentionMaskInterface),
        lambda value: _restore(AttentionMaskInterface, value),
    ),
)


def _restore(interface: type, functions: dict[str, Any]) -> None:
    for name in _registry(interface).keys() - functions.keys():
        del interface._global_mapping[name]
    interface._global_mapping.update(functions)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    pyro.set_rng_seed(0)  # torch, NumPy and random


@pytest.fixture(autouse=True, scope="module")
def _brief_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fit the head to frozen features in a few steps before a fit of Normals, which takes longer
    than all the rest; not where `whole_start` says that something depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("whole_start") is None:
            patch.setattr("bhpeft_pyro.training.initialization._STEPS", 8)
        yield


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that changes global state; put it back, so that only that test fails."""
    before = [read() for _name, read, _restore in GLOBAL_STATE]
    yield
    leaks = []
    for (name, read, restore), value in zip(GLOBAL_STATE, before, strict=True):
        if (after := read()) != value:
            leaks.append(f"{name}: {value} before, {after} after")
            restore(value)
    if leaks:
        pytest.fail("the test changed global state\n" + "\n".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the MiniLM weights. CI must have them; elsewhere the test is skipped."""
    from bhpeft_pyro.data.assets import minilm
    from bhpeft_pyro.errors import DataError

    try:
        return minilm()
    except DataError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def sentiment() -> None:
    """In CI a fetch that fails is a failure; elsewhere only what is in the cache is used."""
    from bhpeft_pyro.data.assets import cache
    from tools import sentiment as source

    file = cache() / source._VADER
    if not source.intact(file, source._VADER_SHA256) and os.environ.get("CI") != "true":
        pytest.skip("fetches from PyPI; set CI=true to run")
