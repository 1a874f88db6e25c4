"""What a step costs, as ratios that a machine's drift does not spoil."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["Quartiles", "Step", "compare", "peak_bytes"]

Step = Callable[[], Any]
Quartiles = dict[str, float]


def compare(
    variants: Mapping[str, Step], pairs: list[tuple[str, str]], rounds: int
) -> dict[str, Quartiles | None]:
    """Time ratios "a / b" for `pairs` of names, None if one of the two is not among `variants`.

    >>> ratios = compare({"ours": bool, "theirs": int}, [("ours", "theirs"), ("ours", "x")], 3)
    >>> sorted(ratios["ours / theirs"]), ratios["ours / x"]
    (['median', 'q25', 'q75'], None)
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            variants[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    found: dict[str, Quartiles | None] = {}
    for a, b in pairs:
        missing = a not in variants or b not in variants
        found[f"{a} / {b}"] = None if missing else _quartiles(seconds[a], seconds[b])
    return found


def _quartiles(above: list[float], below: list[float]) -> Quartiles:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(median, 4), "q25": round(low, 4), "q75": round(high, 4)}


def peak_bytes(run: Step) -> int:
    """The most bytes of tensors alive at once among those that `run` allocates.

    Counted from the allocator's own events, so it is exact and repeatable, which the resident
    memory of a process is not. Scratch memory inside matrix libraries is not in it.

    >>> import torch
    >>> def run():
    ...     torch.zeros(1000)
    ...     return torch.zeros(500) + torch.ones(500)
    >>> peak_bytes(run)
    6000
    """
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
