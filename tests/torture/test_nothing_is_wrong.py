"""A number is right or there is an error: damaged files, and labels that are no numbers.

python -m pytest -m torture -s tests/torture/test_nothing_is_wrong.py
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from outcomes import counted, damaged, ending, load, predicted, sized

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.posterior.saving import FILE
from bhpeft_pyro.testing import tiny_examples, tiny_model


@pytest.fixture(scope="module")
def posteriors() -> tuple[bh.Posterior, bh.Posterior]:
    """Two that differ, the second a round later."""
    kinds = (bh.peft.LoRA(rank=1), bh.peft.Prefix(1))
    first = bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=3, progress=False)
    return first, first.update(tiny_examples(12, seed=1))


@sized(100, 2000)
def test_damaged_files(
    runs: int, posteriors: tuple[bh.Posterior, bh.Posterior], tmp_path: Path
) -> None:
    folder = posteriors[1].save(tmp_path / "run")
    whole = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = predicted(posteriors[1])

    def attempt(chance: random.Random) -> str:
        parts = [whole[:header], whole[header:]]
        number = chance.randrange(2)
        parts[number] = damaged(chance, parts[number])
        (folder / FILE).write_bytes(b"".join(parts))
        return ending(lambda: predicted(load(folder)), expected)

    counted("damaged files", runs, tmp_path, attempt)


RATING = {"likelihood": bh.likelihoods.Normal(0.0, 1.0), "outputs": 1}


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        ({}, [0, 1, math.nan, 1]),
        ({}, [0, 1, None, 1]),
        ({}, [0, 1, 0.5, 1]),
        ({}, [0, 1, -1, 1]),
        (RATING, [0.5, 1.0, math.nan, 2.0]),
        (RATING, [0.5, 1.0, math.inf, 2.0]),
        (RATING, [0.5, 1.0, None, 2.0]),
        (RATING, [0.5, 1.0, "many", 2.0]),
    ],
)
def test_a_label_that_is_none_is_neither_learnt_nor_scored(
    model: dict[str, Any], labels: list[Any]
) -> None:
    bad = {"text": ["w5 w9", "w6 w8", "w5", "w6 w7"], "label": labels}
    good = bad | {"label": [0, 1, 0, 1]}
    options: dict[str, Any] = {"max_steps": 1, "progress": False}
    with pytest.raises(DataError):
        bh.fit(tiny_model((), **model), "normal", bad, **options)
    posterior = bh.fit(tiny_model((), **model), "normal", good, **options)
    for use in (posterior.update, posterior.evaluate):
        with pytest.raises(DataError):
            use(bad)
