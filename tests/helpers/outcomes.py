"""How tests under stress end: they count outcomes, and accept three of them. Posteriors are loaded
with one backbone, which is there before anything runs short."""

from __future__ import annotations

import random
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_a_child

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError, is_out_of_memory
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


def predicted(posterior: bh.Posterior) -> torch.Tensor:
    return posterior.predict(["w5 w20", "w6 w21"], samples=0).probabilities


def ending(forecast: Callable[[], torch.Tensor], expected: torch.Tensor | None = None) -> str:
    """How a forecast of what was damaged ends; with `expected`, only this one counts as right."""
    signal.alarm(60)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = forecast()
            right = expected is None or torch.equal(found, expected)
    except BHPEFTError:
        return ERROR
    except Exception as error:
        return ERROR if is_out_of_memory(error) else f"{type(error).__name__}: {error!s:.80}"
    return RIGHT if right else "another answer"


def counted(
    what: str, runs: int, folder: Path, attempt: Callable[[random.Random], str], guard: Any = None
) -> None:
    """The outcomes of attempts in a child, which may take two more GiB, and a minute for each;
    `guard` watches it."""

    def work() -> Counter[str]:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
        if guard is not None:
            guard()
        chance = random.Random(what)
        return Counter(attempt(chance) for _ in range(runs))

    report(what, Counter(in_a_child(work, folder / "counts")))


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Other bytes."""
    at, length = chance.randrange(len(data)), chance.randrange(1, 200)
    match chance.choice(["flip", "cut", "drop", "repeat", "zero", "noise"]):
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "drop":
            return data[:at] + data[at + length :]
        case "repeat":
            return data[:at] + data[at : at + length] + data[at:]
        case "zero":
            return data[:at] + bytes(length) + data[at + length :]
    return data[:at] + chance.randbytes(length) + data[at + length :]
