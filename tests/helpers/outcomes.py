"""How tests under stress end: they count outcomes, and accept three of them. Posteriors are loaded
with one backbone, which is there before anything runs short."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

RIGHT, OLD, ERROR = "right", "old state", "own error"


BACKBONE, TOKENIZER = tiny_backbone(), tiny_tokenizer()


def load(folder: Path) -> bh.Posterior:
    return bh.Posterior.load(folder, BACKBONE, tokenizer=TOKENIZER)


def sized(small: int, large: int) -> Any:
    """Once small, in the suite, and once large."""
    return pytest.mark.parametrize(
        "runs", [small, pytest.param(large, marks=pytest.mark.torture)], ids=["small", "large"]
    )


def report(what: str, counts: Counter[str], *others: str) -> None:
    """Print the counts, and fail on any outcome but the three and `others`."""
    print(f"\n{what}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    assert not counts.keys() - {RIGHT, OLD, ERROR, *others}, counts
