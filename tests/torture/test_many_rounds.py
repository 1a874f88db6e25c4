"""A stream of many rounds: memory, objects, hooks, disk and time of a round do not grow."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from outcomes import sized

import bhpeft_pyro as bh
from bhpeft_pyro.decisions import novelty
from bhpeft_pyro.testing import tiny_examples, tiny_model

PER_ROUND = 40  # objects of a round's report, which the lineage keeps


@dataclass
class Measured:
    """After some rounds; the sizes in kB, seconds of this process's computation for a round."""

    objects: int
    hooks: int
    memory: float
    disk: float
    seconds: float


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what memory is used")
@sized(16, 500)
def test_no_round_costs_more_than_those_before(
    runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "MOST", 20)  # learnt texts whose states are kept
    model, parts, every = tiny_model((bh.peft.LoRA(rank=1),)), [], runs // 4
    modules = [*model.network.backbone.modules()]

    def weeks() -> Iterator[tuple[str, object]]:
        before = time.process_time()
        for number in range(runs + 1):
            if number and number % every == 0:
                seconds = (time.process_time() - before) / every
                gc.collect()
                folders = [path for path in (tmp_path / "rounds").iterdir() if path.is_dir()]
                newest = max(folders, key=lambda path: path.stat().st_mtime)
                measured = Measured(
                    objects=len(gc.get_objects()),
                    hooks=sum(len(each._forward_hooks) for each in modules),
                    memory=int(Path("/proc/self/statm").read_text().split()[1])
                    * os.sysconf("SC_PAGE_SIZE")
                    / 1000,
                    disk=sum(path.stat().st_size for path in newest.iterdir()) / 1000,
                    seconds=seconds,
                )
                parts.append(measured)
                print(f"after {number} rounds: {measured}")
                before = time.process_time()
            if number < runs:
                yield f"week {number}", tiny_examples(8, seed=number)

    how = {"max_steps": 1, "progress": False}
    bh.stream(model, weeks(), tmp_path, guide="normal", **how)  # type: ignore[arg-type]
    first, *_, last = parts
    more = 3 * every  # rounds from the first to the last
    assert last.objects - first.objects < PER_ROUND * more
    assert last.hooks == first.hooks
    assert last.memory - first.memory < 10_000 + 30 * more
    assert last.disk < 1.1 * first.disk
    assert last.seconds < 2 * first.seconds
