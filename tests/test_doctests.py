"""The examples in the docstrings, each module under the same seed and leak guards as any test."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bhpeft_pyro

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bhpeft_pyro.__path__, "bhpeft_pyro.")
    if not module.name.endswith(".__main__")  # importing it would run it
)


@pytest.mark.parametrize("name", ["bhpeft_pyro", *MODULES])
def test_examples(name: str) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} fail"
