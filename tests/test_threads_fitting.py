"""Predictions beside a fit, and fits beside one another: neither disturbs the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_examples, tiny_model

TEXTS = ["w5 w20 w21", "w6 w22"]


def state(posterior: bh.Posterior) -> list[Tensor]:
    return list(posterior.guide.state_dict().values())


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_predictions_beside_an_update(guide: str) -> None:
    old = bh.fit(tiny_model(aligned=True), guide, tiny_examples(), max_steps=20, progress=False)
    expected = old.predict(TEXTS).probabilities
    new = tiny_examples(seed=1)
    alone = state(old.update(new, max_steps=40))
    done, found = threading.Event(), []

    def predict() -> None:
        while not done.is_set():
            found.append(old.predict(TEXTS).probabilities)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(predict)
        try:
            beside = state(old.update(new, max_steps=40))
        finally:
            done.set()
        running.result()
    assert len(found) > 5  # it did not wait for the end of the fit
    for each in found:
        torch.testing.assert_close(each, expected)
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


def test_fits_in_two_threads_are_those_of_one() -> None:
    models, data = [tiny_model() for _ in range(6)], tiny_examples()

    def fit(number: int) -> list[Tensor]:
        options: dict[str, Any] = {"max_steps": 10, "progress": False, "seed": number % 3}
        return state(bh.fit(models[number], "normal", data, **options))

    one_by_one = [fit(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(fit, range(3, 6)))
    for first, second in zip(one_by_one, at_once, strict=True):
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
