"""What the experiments are made of: splits, rival methods, tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats

import bhpeft_pyro as bh
from bhpeft_pyro.data.copies import plain
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.guides import FunctionGuide
from bhpeft_pyro.prediction.draws import draw
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer
from tools.experiments.methods import dropout
from tools.experiments.tables import Table, difference
from tools.experiments.tasks import Shift, Task, split

TASK = Task("toy", 2, bh.likelihoods.Categorical)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"w{5 + i % 3} w{10 + i}", "label": i % 3} for i in range(36)]
    again = [{**row, "text": str(row["text"]).replace(" ", "  ")} for row in rows[6:9]]
    rows += rows[:6] + again  # some texts are there twice
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_splits_share_no_text_and_depend_on_the_seed(folder: Path) -> None:
    parts = split(folder, TASK, 12, 8, 16, seed=0)
    every = (parts.train, parts.validation, parts.tests["test"])
    texts = [{plain(text) for text in part["text"]} for part in every]
    assert [len(each) for each in texts] == [12, 8, 16]
    assert len(set.union(*texts)) == 36
    again = split(folder, TASK, 12, 8, 16, seed=0)
    assert again.train["text"][:] == parts.train["text"][:]
    assert split(folder, TASK, 12, 8, 16, seed=1).train["text"][:] != parts.train["text"][:]
    with pytest.raises(DataError, match="36 rows, 52 are needed"):
        split(folder, TASK, 12, 20, 20, seed=0)
    with pytest.raises(DataError, match=r"there is no nothing\.jsonl"):
        split(folder, Task("nothing", 2, bh.likelihoods.Categorical), 1, 1, 1, seed=0)


def test_shifts_and_classes_left_out(folder: Path) -> None:
    shifts = {"unseen": Shift("toy", label=2), "known": Shift("toy", label=1, labelled=True)}
    task = Task("toy", 2, bh.likelihoods.Categorical, classes=2, shifts=shifts)
    parts = split(folder, task, 8, 8, 8, seed=0)
    assert {*parts.train["label"], *parts.tests["test"]["label"]} == {0, 1}
    assert len(parts.tests["unseen"]) == 8
    assert parts.tests["unseen"].column_names == ["text"]  # its labels are none of the task's
    assert all(text.startswith("w7 ") for text in parts.tests["unseen"]["text"])
    assert set(parts.tests["known"]["label"]) == {1}
    learnt = {*parts.train["text"], *parts.validation["text"]}
    assert not learnt & {*parts.tests["known"]["text"]}
    other = split(folder, task, 8, 8, 7, seed=0)  # a row less, of the tests
    assert len({parts.digest, other.digest, split(folder, task, 8, 8, 8, seed=1).digest}) == 3
    assert split(folder, task, 8, 8, 8, seed=0).digest == parts.digest


# Rivals.


def test_dropout_drops_whole_inputs_and_keeps_the_mean() -> None:
    """Of the weights themselves, whichever point their coordinates begin at."""
    network = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(2), bh.Head(2), tiny_tokenizer())
    model = bh.Model(network)
    module = FunctionGuide(dropout(model, 0.25))
    with torch.no_grad():
        module()
        module.parameters_["head/weight/point"].fill_(2.0)
        module.parameters_["lora/query/A/point"].add_(0.1)
    drawn = draw(model, module, 2000)
    weight = drawn["head.weight"][:, 0]
    assert weight.unique().tolist() == [0.0, pytest.approx(2 / 0.75)]
    assert (weight[:, 0] == weight[:, 1]).all()  # a column, for both outputs
    assert weight.mean().item() == pytest.approx(2.0, abs=0.05)
    points = {
        site.name: module.parameters_[site.name.replace(".", "/") + "/point"]
        for site in network.sites
    }
    start = network.coordinates(points)["lora.query.A"]
    other = network.coordinates(drawn)["lora.query.A"][:, 0]
    gone = other.abs() < 1e-6  # but for rounding
    assert (gone | torch.isclose(other, start / 0.75, atol=1e-6)).all()
    assert (gone[:, :, 0] == gone[:, :, 1]).all()
    assert start.abs().min() > 1e-4
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (drawn["lora.query.B"] == points["lora.query.B"]).all()


# Tables.


def test_a_table_says_the_same_in_markdown_and_csv() -> None:
    records = [{"method": "a", "nll": value, "f1": 0.04} for value in (0.1, 0.3)]
    table = Table.over_seeds("50 %", ["method"], [*records, {"method": "c", "nll": 0.5}], "Note.")
    assert table.markdown().splitlines() == [
        *("## 50 %", ""),
        "| method | seeds | nll | f1 |",
        "|---|---|---|---|",
        "| a | 2 | 0.200 ± 0.100 | 0.040 ± 0.000 |",
        "| c | 1 | 0.500 |  |",
        *("", "Note."),
    ]
    read = pd.read_csv(io.StringIO(table.csv()), index_col="method")
    assert read.loc["a", "nll"] == 0.2 and read.loc["a", "nll se"] == pytest.approx(0.1)
    assert read.loc["c", ["nll se", "f1"]].isna().all()


def test_differences_are_paired_by_seed_or_over_the_rows_of_one() -> None:
    ours, theirs = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(1)).double()
    found = difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    test = stats.ttest_rel(ours.mean(1), theirs.mean(1))
    assert found["p"][0] == pytest.approx(test.pvalue, rel=1e-3)
    assert found["nll"][0] == pytest.approx((ours - theirs).mean().item(), rel=1e-3)
    one = difference({3: ours[0]}, {3: theirs[0], 4: theirs[1]})
    expected = stats.sem((ours - theirs)[0].numpy())
    assert one["nll"][1] == pytest.approx(expected, rel=1e-4)
    same = dict(enumerate(ours))
    assert difference(same, same)["p"][0] == 1
