"""The examples in the docstrings, each module under the same seed and leak guards as any test."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bhpeft_pyro
import tools

pytestmark = pytest.mark.whole_start  # as a reader runs them
MODULES = sorted(
    module.name
    for package in (bhpeft_pyro, tools)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(("__main__", "notebooks"))  # importing them may run them
)


@pytest.mark.parametrize("name", ["bhpeft_pyro", *MODULES])
def test_examples(name: str) -> None:
    if name in ("bhpeft_pyro.integrations.mlflow", "bhpeft_pyro.integrations.ray"):
        pytest.importorskip(name.split(".")[1])
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} fail"
