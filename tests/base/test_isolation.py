"""Threads get what each would get alone, and a call leaves the caller's state as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pyro
import pytest
import torch
from components import equal, state
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

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


@pytest.mark.filterwarnings("ignore::bhpeft_pyro.data.CutWarning")
def test_texts_are_cut_alike_in_all_threads() -> None:
    """A tokenizer keeps the limit of its last call, of whichever thread."""
    tokenizer, limit = tiny_tokenizer(), Columns(max_length=8)
    short, long = ["w5 w6", "w7"] * 20, ["w5 w6", "w7 " * 30] * 20

    def encoded(texts: list[str]) -> Tensor:
        return encode(texts, tokenizer, kind="class", columns=limit, labelled=False).lengths

    expected = [encoded(texts) for texts in (short, long)]
    tasks = [lambda texts=texts: encoded(texts) for texts in (short, long) * 3]
    for number, found in enumerate(at_once(tasks, rounds=15)):
        assert all(torch.equal(each, expected[number % 2]) for each in found)


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


def test_guides_are_made_and_posteriors_loaded_beside_predictions(tmp_path: Path) -> None:
    """Each runs the prior under Pyro's handlers, which all threads share."""
    backbone = tiny_backbone()
    posterior = fit(backbone, (), seed=1)
    folder = posterior.save(tmp_path / "saved")
    tasks = [
        lambda: posterior.predict(TEXTS[:2], samples=4).probabilities,
        lambda: bh.autoguide("normal", posterior.model).means()["head.weight"],
        lambda: bh.Posterior.load(folder, backbone).guide.means()["head.weight"],
        lambda: posterior.grow(["2"]).guide.means()["head.weight"],
    ]
    alone, interval = [task() for task in tasks], sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        found = at_once(tasks, rounds=12)
    finally:
        sys.setswitchinterval(interval)
    for expected, results in zip(alone, found, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_a_fit_and_a_prediction_in_two_threads(guide: str) -> None:
    options: dict[str, Any] = {"max_steps": 4, "progress": False}
    old = bh.fit(tiny_model(), guide, tiny_examples(), components=1, **options)
    new = tiny_examples(24, seed=1)
    predicted, learnt = old.predict(TEXTS, seed=1).probabilities, state(old.update(new, **options))
    begun = Event()

    def update() -> dict[str, Tensor]:
        return state(old.update(new, callback=lambda _: begun.set(), **options))

    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(update)
        assert begun.wait(30)
        assert torch.equal(old.predict(TEXTS, seed=1).probabilities, predicted)
        assert equal(learnt, fit.result())


def test_fits_in_two_threads_are_those_of_one() -> None:
    models, data = [tiny_model() for _ in range(6)], tiny_examples()

    def fit(number: int) -> dict[str, Tensor]:
        options: dict[str, Any] = {"max_steps": 10, "progress": False, "seed": number % 3}
        return state(bh.fit(models[number], "normal", data, **options))

    one_by_one = [fit(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(fit, range(3, 6)))
    for first, second in zip(one_by_one, at_once, strict=True):
        assert equal(first, second)


def of_the_caller() -> list[Any]:
    """What a call could change for its caller."""
    return [
        torch.get_rng_state().tolist(),
        {**pyro.get_param_store()},
        [*pyro.poutine.runtime._PYRO_STACK],
        [*pyro.poutine.runtime._DIM_ALLOCATOR._stack],
        pyro.settings.get(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


@pytest.mark.parametrize("guide", ["normal", "laplace", "mvn"])
def test_calls_leave_the_callers_state_as_it_was(guide: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "progress": False}
    with (
        pyro.get_param_store().scope(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pyro.validation_enabled(True),
    ):
        pyro.param("own", torch.ones(2))
        before = of_the_caller()
        posterior = bh.fit(tiny_model(), guide, tiny_examples(), components=2, **options)
        posterior.update(tiny_examples(seed=1), **options).save(tmp_path)
        again = bh.Posterior.load(tmp_path, tiny_backbone(), tokenizer=tiny_tokenizer())
        assert of_the_caller() == before
        with pyro.poutine.trace() as tracer, pyro.plate("rows", 3):
            within = of_the_caller()
            again.predict(TEXTS)
            assert of_the_caller() == within and not tracer.trace.nodes.keys() - {"rows"}
        with pytest.raises(ZeroDivisionError):
            posterior.update(tiny_examples(seed=1), callback=lambda _: 1 // 0, **options)
        assert of_the_caller() == before
