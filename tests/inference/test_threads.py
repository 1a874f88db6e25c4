"""Several threads may predict at once, on one backbone and on several."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

TEXTS = [f"w{2 + i} w{3 + i} w{40 - i} w9" for i in range(24)]


def fit(backbone: Any, kinds: Any, seed: int) -> bh.Posterior:
    network = bh.RandomPEFT(backbone, kinds, bh.Head(2), tiny_tokenizer())
    return bh.fit(
        bh.Model(network),
        "normal",
        tiny_examples(16, seed=seed),
        max_steps=4,
        lr=0.5,
        seed=seed,
        progress=False,
    )


def at_once(tasks: list[Callable[[], Tensor]], rounds: int = 4) -> list[list[Tensor]]:
    """Each task in a thread of its own, several times over, all started together."""
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], Tensor]) -> list[Tensor]:
        barrier.wait(timeout=30)
        return [task() for _ in range(rounds)]

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run, t) for t in tasks]]


@pytest.mark.parametrize("shared", [True, False])
def test_threads_give_what_each_gives_alone(shared: bool) -> None:
    one = tiny_backbone()
    other = one if shared else tiny_backbone()
    first = fit(one, bh.presets.bh_peft(), seed=1)
    second = fit(other, bh.presets.lora(rank=2), seed=2)
    tasks = [
        lambda: first.predict(TEXTS, samples=6, seed=3).probabilities,
        lambda: second.predict(TEXTS, samples=6, seed=4).probabilities,
        lambda: first.sample(20, seed=5)["lora.query.B"],
    ]
    alone = [task() for task in tasks]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    random = torch.get_rng_state()
    for expected, results in zip(alone, at_once(tasks), strict=True):
        for result in results:
            assert torch.equal(result, expected)
    assert torch.equal(torch.get_rng_state(), random)


def test_one_posterior_serves_several_threads() -> None:
    posterior = fit(tiny_backbone(), bh.presets.unipelt(), seed=1)
    tasks = [
        lambda seed=seed: posterior.predict(TEXTS, samples=5, seed=seed).probabilities
        for seed in range(3)
    ]
    alone = [task() for task in tasks]
    for expected, results in zip(alone, at_once(tasks, rounds=3), strict=True):
        assert all(torch.equal(result, expected) for result in results)
