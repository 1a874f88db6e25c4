"""How many labels a queue saves: what is bought, and the tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tools.experiments import labels, labels_report
from tools.experiments.budgets import BUDGETS
from tools.experiments.job import load_frozen
from tools.experiments.labels import ARMS
from tools.experiments.runs import Given, results

SMALL = {"sizes": [20, 40, 80], "pool": 100, "test": 24, "steps": 2, "components": 2}


@pytest.fixture(scope="module")
def bought(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results by arm."""
    load, out = partial(load_frozen, "tiny", "cpu"), tmp_path_factory.mktemp("labels")
    given = Given({**SMALL, "peft": "head only"}, load, "tiny", None, out)
    experiment = labels.experiment(BUDGETS["tiny"])
    done = results(experiment, given, [("classes", 0, arm) for arm in ARMS])
    assert experiment.tables(done)
    return {result["arm"]: result for result in done}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_buys_each_text_once_in_batches(bought: dict[str, Any], arm: str) -> None:
    first, second, last = (batch["rows"] for batch in bought[arm]["batches"])
    assert [len(rows) for rows in (first, second, last)] == [20, 40, 80]
    assert first == second[:20] and second == last[:40]
    assert len({*last}) == 80 and {*last} <= {*range(100)}


def test_arms_choose_differently_from_the_same_pool(bought: dict[str, Any]) -> None:
    assert len({result["data"] for result in bought.values()}) == 1
    starts, ends = (
        {arm: tuple(result["batches"][at]["rows"]) for arm, result in bought.items()}
        for at in (0, -1)
    )
    assert starts["random"] == starts["information"] == starts["total uncertainty"]
    assert starts["typical, then information"] != starts["random"]
    assert len({*ends.values()}) == len(ARMS)


def test_tables_say_how_many_labels_are_enough() -> None:
    curves = {"random": (0.5, 0.6, 0.8), "information": (0.5, 0.9, 0.9), "other": (0.5, 0.6, 0.7)}
    facts = {"task": "news", "components": 5, "peft": "hybrid", "steps": 300, "pool": 2000}
    facts |= {"test": 400, "commit": "a"}
    results = [
        {**facts, "arm": arm, "seed": seed, "labels": size, "scores": {"accuracy": value}}
        for arm, values in curves.items()
        for seed in (0, 1)
        for size, value in zip((20, 40, 80), values, strict=True)
    ]
    bought, needed = labels_report.tables(results)
    assert len(bought.means) == 9
    assert bought.means["accuracy"]["information", "40", "2"] == 0.9
    assert needed.means["accuracy"].to_dict() == {
        ("random",): 80,
        ("information",): pytest.approx(20 + 20 * 3 / 4),
        ("other",): 80,
    }
