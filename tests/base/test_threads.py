"""Several threads predict at once, on one backbone and on several; fits wait for each other."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pyro
import pytest
import torch
from components import equal, state
from exact import independent
from forks import start, wait
from outcomes import RIGHT, report, sized
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.base import threads
from bhpeft_pyro.base.threads import fitting, give_way, sampling, seeded
from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
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
        lambda: posterior.grow(1).guide.means()["head.weight"],
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
def test_a_fit_gives_way_to_predictions_and_is_the_same(guide: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": 1, "max_steps": 4, "progress": False}
    old = bh.fit(tiny_model(), guide, tiny_examples(), **options)
    folder, backbone = old.save(tmp_path / "saved"), old.model.network.backbone
    expected, new = old.predict(TEXTS, seed=1).probabilities, tiny_examples(24, seed=1)
    alone, answers, begun = state(old.update(new, max_steps=40)), 0, Event()
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(
            lambda: state(old.update(new, max_steps=40, callback=lambda _: begun.set()))
        )
        assert begun.wait(30)
        while not fit.done():
            assert torch.equal(old.predict(TEXTS, seed=1).probabilities, expected)
            bh.Posterior.load(folder, backbone, tokenizer=tiny_tokenizer())
            answers += not fit.done()
        assert equal(alone, fit.result())
    assert answers


def shared() -> list[Any]:
    """What threads share, as seen by the thread that asks."""
    return [
        [*pyro.poutine.runtime._PYRO_STACK],
        [*pyro.poutine.runtime._DIM_ALLOCATOR._stack],
        [*pyro.get_param_store()],
        pyro.settings.get(),
        torch.get_rng_state().tolist(),
    ]


def test_a_turn_in_between_finds_and_leaves_what_threads_share() -> None:
    before = shared()
    inside, done = Event(), Event()

    def long() -> None:
        with (
            fitting(),
            seeded(5),
            pyro.get_param_store().scope(),
            pyro.validation_enabled(False),
            pyro.plate("rows", 3),
            pyro.poutine.trace(),
        ):
            pyro.param("own", torch.zeros(1))
            torch.rand(3)
            own = shared()
            assert all(mine != theirs for mine, theirs in zip(own, before, strict=True))
            inside.set()
            for _ in range(1000):
                give_way()
                assert shared() == own
                if done.wait(0.01):
                    raise ArithmeticError

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(long)
        assert inside.wait(30)
        with sampling():
            assert shared() == before
            pyro.param("another", torch.zeros(1))
            torch.manual_seed(3)
        done.set()
        with pytest.raises(ArithmeticError):
            work.result(30)
    assert shared() == before


def test_a_turn_that_cannot_begin_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all later turns would wait for ever, as after a fork with too little memory."""

    def too_little() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(threads, "_Shared", too_little)
        with pytest.raises(MemoryError), threads.sampling():
            pass
    assert threads._begin(timeout=1.0)
    threads._end()


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


@forks
def test_a_fork_waits_for_the_end_of_a_turn() -> None:
    """Torch's own locks, such as that of `manual_seed`, would stay held in the child."""
    locks, held = torch.cuda._initialization_lock, Event()

    def turn() -> None:
        with sampling(), locks:
            held.set()
            time.sleep(0.3)

    def child() -> None:
        signal.alarm(20)  # ends it if it hangs
        torch.manual_seed(0)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(turn)
        assert held.wait(30)
        assert wait(start(child)) == 0


@forks
@sized(3, 200)
def test_processes_are_forked_beside_fits_at_any_moment(runs: int) -> None:
    old, new = bh.fit(tiny_model(), "normal", tiny_examples(), max_steps=4), tiny_examples(seed=1)
    chance, stop, counts = random.Random(0), Event(), Counter[str]()

    def fits() -> None:
        while not stop.is_set():
            bh.fit(tiny_model(), "normal", tiny_examples(), max_steps=10, progress=False)

    def child() -> None:
        signal.alarm(60)
        old.predict(TEXTS)
        old.update(new, max_steps=2)

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(fits)
        for _ in range(runs):
            time.sleep(chance.uniform(0, 0.2))
            counts["hung" if wait(start(child)) else RIGHT] += 1
        stop.set()
        beside.result(60)
    report("forked beside fits", counts)


@forks
def test_a_process_forked_in_the_middle_of_a_step_predicts_and_fits_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lock is held, and Pyro's handlers are set, by a thread that the child does not have: it
    waits for the fork itself."""
    monkeypatch.setattr(threads, "_FORK", 0.1)
    old, new = bh.fit(tiny_model(), "normal", tiny_examples(), max_steps=4), tiny_examples(seed=1)
    expected, learnt = old.predict(TEXTS).probabilities, state(old.update(new, max_steps=2))
    fitting, forked = Event(), Event()

    def prior(sites: Any) -> dict[str, Tensor]:
        if pyro.poutine.runtime._PYRO_STACK:  # in the loss
            fitting.set()
            forked.wait(60)
        return independent(sites)

    def as_ever() -> None:
        signal.alarm(60)  # ends it if it hangs
        assert torch.equal(old.predict(TEXTS).probabilities, expected)
        assert equal(state(old.update(new, max_steps=2)), learnt)

    with ThreadPoolExecutor() as pool:
        fit = pool.submit(
            bh.fit, tiny_model((), prior=prior), "normal", tiny_examples(), max_steps=2
        )
        assert fitting.wait(60)
        code = wait(start(as_ever))
        forked.set()
        assert len(fit.result().lineage) == 1
    assert code == 0
