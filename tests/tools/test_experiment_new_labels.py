"""The experiment with new labels: which rows come when, and its table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from saves import backbone_in

from bhpeft_pyro.model.backbone import load_backbone
from tools.experiments import new_labels
from tools.experiments.new_labels import ARMS
from tools.experiments.runs import Given, results

TOPICS = ("business", "science", "sport", "world")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = (
        {"text": f"w{5 + number} w{10 + i}", "label_name": topic}
        for i in range(40)
        for number, topic in enumerate(TOPICS)
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "news-agnews.jsonl").write_text(text)
    backbone_in(tmp_path / "backbone")
    return tmp_path


@pytest.mark.parametrize("again", [0, 2])
def test_each_round_has_one_more_topic_and_no_text_comes_twice(folder: Path, again: int) -> None:
    rounds, tests = new_labels._stream(folder, 1, 6, again, 4)
    first = list(dict.fromkeys(rounds[0]["label"]))
    third, fourth = rounds[1]["label"][0], rounds[2]["label"][0]
    assert sorted((*first, third, fourth)) == sorted(TOPICS)
    assert list(dict.fromkeys(tests["label"])) == [*first, third, fourth]
    counts = [{name: part["label"].count(name) for name in TOPICS} for part in rounds]
    assert counts[0] == {name: 6 * (name in first) for name in TOPICS}
    assert counts[1] == dict.fromkeys(TOPICS, again) | {third: 6, fourth: 0}
    assert counts[2] == dict.fromkeys(TOPICS, again) | {fourth: 6}
    texts = [text for part in (*rounds, tests) for text in part["text"]]
    assert len(set(texts)) == len(texts)


def test_every_arm_learns_all_rounds(folder: Path) -> None:
    setting = {"rows": 12, "again": 3, "test": 5}
    load = partial(load_backbone, str(folder / "backbone"), "cpu")
    given = Given(setting, load, "tiny", folder, folder / "out")
    done = results(new_labels.EXPERIMENT, given, [(0, arm) for arm in ARMS])
    shown = new_labels.table(done).markdown()
    assert all(f"| {arm} | 1 | 0." in shown or f"| {arm} | 1 | 1." in shown for arm in ARMS)
