"""How tests under stress end: they count outcomes, and accept three of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

RIGHT, OLD, ERROR = "right", "old state", "own error"


def sized(small: int, large: int) -> Any:
    """Once small, in the suite, and once large."""
    return pytest.mark.parametrize(
        "runs", [small, pytest.param(large, marks=pytest.mark.torture)], ids=["small", "large"]
    )


def report(what: str, counts: Counter[str], *others: str) -> None:
    """Print the counts, and fail on any outcome but the three and `others`."""
    print(f"\n{what}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    assert not counts.keys() - {RIGHT, OLD, ERROR, *others}, counts
