"""How many labels a queue saves: what is bought, being killed, tables from files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bhpeft_pyro.errors import ConfigError
from tools.experiments import labels, labels_report
from tools.experiments.labels import ARMS

SMALL: dict[str, Any] = {
    **{"budget": "tiny", "task": ["classes"], "seeds": 1, "most": 80, "pool": 100, "test": 24},
    **{"steps": 2, "components": 2, "peft": "head only", "device": "cpu"},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    labels.labels(out=folder, **SMALL)
    return folder


def stored(out: Path, arm: str) -> list[dict[str, Any]]:
    every = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return sorted((one for one in every if one["arm"] == arm), key=lambda one: one["labels"])


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_buys_each_text_once_in_batches(out: Path, arm: str) -> None:
    first, second, last = stored(out, arm)
    assert [len(one["rows"]) for one in (first, second, last)] == [20, 40, 80]
    assert first["rows"] + first["next"] == second["rows"]
    assert second["rows"] + second["next"] == last["rows"]
    assert len({*last["rows"]}) == 80 and {*last["rows"]} <= {*range(100)}
    assert last["next"] == []
    assert len({one["data"] for one in (first, second, last)}) == 1


def test_arms_choose_differently_from_the_same_pool(out: Path) -> None:
    every = {arm: stored(out, arm) for arm in ARMS}
    assert len({runs[0]["data"] for runs in every.values()}) == 1
    starts = {arm: tuple(runs[0]["rows"]) for arm, runs in every.items()}
    assert starts["random"] == starts["information"] == starts["total uncertainty"]
    assert starts["typical, then information"] != starts["random"]
    assert len({tuple(runs[-1]["rows"]) for runs in every.values()}) == len(ARMS)


def test_a_killed_run_goes_on_with_the_next_batch(out: Path, tmp_path: Path) -> None:
    for path in out.glob("*random*.json"):
        if ".80." not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    labels.labels(out=tmp_path, **SMALL | {"arm": ["random"]})
    assert stored(tmp_path, "random")[-1]["rows"] == stored(out, "random")[-1]["rows"]
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())
    with pytest.raises(ConfigError, match="was run with steps 2, not 3"):
        labels.labels(out=tmp_path, **SMALL | {"steps": 3})


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
