"""How many seconds something takes on the machine that it runs on.

Times on a shared machine drift by more than what is to be measured. So variants take turns, one run
each in a round, and what is reported is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Step", "clock", "device_name", "in_turn", "over"]

Step = Callable[[], Any]


def device_name(device: torch.device) -> str:
    """What tables call it: "CPU", or the name of a GPU."""
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor, so that other work counts little; on a GPU by the wall clock, once
    all its work is done."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def in_turn(
    variants: Mapping[str, Step], rounds: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; another one begins each round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = now()
            variants[name]()
            seconds[name].append(now() - started)
    return seconds


def over(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of the ratios within a round.

    >>> over([3.0, 30.0, 300.0], [2.0, 20.0, 300.0])
    1.5
    """
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))
