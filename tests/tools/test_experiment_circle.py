"""The whole circle: which labels each arm spends, and tables from files alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from saves import backbone_in

from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.posterior.posterior import Posterior
from tools.experiments import circle
from tools.experiments.circle import ARMS
from tools.experiments.methods import upper_hybrid
from tools.experiments.runs import Given, results

SMALL: dict[str, Any] = {"rows": 28, "drawn": 14, "budget": 20, "weeks": 2, "error": 0.3}


def run(data: Path, out: Path, arm: str) -> None:
    load = partial(load_backbone, str(data / "backbone"), "cpu")
    results(circle.EXPERIMENT, Given(SMALL, load, "tiny", data, out), [(0, arm)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four whole weeks of four texts a day, of two topics that one word tells."""
    folder = tmp_path_factory.mktemp("news")
    rows = (
        {
            "date": f"1987-03-{2 + i // 4:02}T10:00:00",
            "text": f"w{5 + i % 2} w{20 + i // 30} w{i % 30}",
            "label_name": ("a", "b")[i % 2],
        }
        for i in range(112)
    )
    (folder / "news-reuters-1987.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone_in(folder / "backbone")
    return folder


@pytest.fixture
def learnt(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hashes of the texts of each update, and of the calibration rows of each promise."""
    seen: list[Any] = []
    update, promise = Posterior.update, Posterior.promise

    def updating(self: Posterior, rows: Any, **options: Any) -> Posterior:
        seen.append(("update", {*rows.hashes.tolist()}))
        return update(self, rows, **options)

    def promising(self: Posterior, rows: Any, *how: Any) -> Posterior:
        seen.append(("promise", {*rows.hashes.tolist()}))
        return promise(self, rows, *how)

    monkeypatch.setattr(circle, "upper_hybrid", lambda: upper_hybrid(1))
    monkeypatch.setattr(Posterior, "update", updating)
    monkeypatch.setattr(Posterior, "promise", promising)
    return seen


@pytest.mark.parametrize("arm", ARMS)
def test_labels_are_counted_and_no_promise_is_set_on_learnt_rows(
    arm: str, data: Path, learnt: list[Any], tmp_path: Path
) -> None:
    run(data, tmp_path, arm)
    (path,) = tmp_path.glob("*.json")
    first, *weeks = json.loads(path.read_text())["weeks of"]
    assert (first["labels"], len(weeks)) == (28, 3)
    for week in weeks:
        assert week["labels"] + week["answered"] + week["open"] == week["texts"] == 28
        assert week["wrong"] <= min(week["answered"], week["wrong of all"])
        assert week["answered"] == 0 or week["promised"] or not ARMS[arm].promises
    labels = [week["labels"] for week in weeks]
    known: set[int] = set()
    for what, hashes in learnt:
        if what == "update":
            assert not known & hashes  # no label is learnt twice
            known |= hashes
        else:
            assert not known & hashes
    calibration = [len(hashes) for what, hashes in learnt if what == "promise"]
    if ARMS[arm].promises:
        assert calibration == [14, 28, 28]  # those of two weeks, the newest among them
        assert all(14 <= count <= 28 for count in labels)
        assert len(known) == sum(labels) - 14  # the last week's random rows are kept apart
    else:
        assert calibration == [] and len(known) == sum(labels)
    if arm == "everything labelled":
        assert labels == [28] * 3
    elif arm == "nothing after the first week":
        assert labels == [0] * 3 and all(week["answered"] == 28 for week in weeks)
    elif ARMS[arm].asked == "all":
        assert all(week["open"] == 0 for week in weeks)
    else:
        assert all(week["labels"] <= 20 for week in weeks)
        asked = [week["labels"] - 14 for week in weeks]  # of 14, six at most
        assert asked == [min(14 - week["answered"], 6) for week in weeks] and max(asked) > 0


def test_the_table_adds_up_the_weeks() -> None:
    week = {"labels": 3, "promised": True, "answered": 5, "wrong": 1, "open": 2, "wrong of all": 4}
    facts = {"arm": "promise and queue", "seed": 0, "commit": "a", **SMALL}
    facts["weeks of"] = [{"texts": 9, "labels": 9}, {"texts": 10, **week}, {"texts": 10, **week}]
    shown = circle.table([facts]).markdown()
    cells = [cell.strip() for cell in shown.splitlines()[4].split("|")[1:-1]]
    assert cells[0] == "promise and queue" and cells[1:] == [
        *("1", "15.000", "2.000", "10.000", "2.000", "0.200", "0.200", "4.000", "0.600")
    ]
