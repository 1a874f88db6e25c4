"""What something takes on the machine that it runs on: seconds, and bytes of tensors.

Times on a shared machine drift by more than what is to be measured. So variants take turns, one run
each in a round, and what is reported is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Step", "clock", "device_name", "in_turn", "over", "peak_bytes"]

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


def peak_bytes(run: Step, device: torch.device) -> int:
    """The most bytes of tensors alive at once among those that `run` allocates.

    Counted from the allocator's own events, so it is exact and repeatable, which the resident
    memory of a process is not. Scratch memory inside matrix libraries is left out on a CPU.

    >>> def run():
    ...     torch.zeros(1000)
    ...     return torch.zeros(500) + torch.ones(500)
    >>> peak_bytes(run, torch.device("cpu"))
    6000
    """
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, size in memory:
        alive += size
        peak = max(peak, alive)
    return peak
