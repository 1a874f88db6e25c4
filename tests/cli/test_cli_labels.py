"""The program on several labels a text: from a CSV file to predictions and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import bhpeft, error, read_csv, write_csv
from saves import backbone_in

from bhpeft_pyro.cli.options import Reading
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data.sources import load

TEXTS = [f"w{5 + i % 2} w{10 + i}" for i in range(12)]
CELLS = [["art", "sport"], ["sport"], []] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    backbone_in(root / "tiny")
    write_csv(root / "train.csv", text=TEXTS, labels=[json.dumps(cell) for cell in CELLS])
    rows = [{"text": t, "labels": c} for t, c in zip(TEXTS, CELLS, strict=True)]
    (root / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fit = ("fit", root / "train.csv", "--backbone", root / "tiny", "--guide", "normal")
    quick = ("--preset", "head_only", "--max-steps", 3, "--device", "cpu")
    bhpeft(*fit, *quick, "--out", root / "run")
    return root


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_lists_are_several_labels(folder: Path, name: str) -> None:
    task = infer(load(folder / name), Reading())
    assert str(task) == "labels: 'labels' from 'text', 2 labels (art, sport)"


def test_predictions_have_the_labels_and_their_probabilities(folder: Path) -> None:
    out = folder / "out.csv"
    result = bhpeft("predict", folder / "run", folder / "train.csv", "--out", out)
    assert "{" not in result.stdout  # probabilities by label are in the file alone
    rows = read_csv(out)
    assert len(rows) == 12
    for row in rows:
        probability = json.loads(row["probability"])
        assert [*probability] == ["art", "sport"]
        above = [name for name, p in probability.items() if p > 0.5]
        assert json.loads(row["prediction"]) == above
        assert float(row["epistemic"]) >= 0
    assert sum(row["flagged"] == "True" for row in rows) == 2
    for option, value, shown in (("--by", "confidence", "'confidence'"), ("--certainty", 1, "1.0")):
        wrong = error("predict", folder / "run", folder / "train.csv", option, value,
                      "--out", folder / "no.csv")  # fmt: skip
        assert f"{option}: got {shown} for labels" in wrong


def test_evaluate_and_report(folder: Path) -> None:
    scores = json.loads(bhpeft("evaluate", folder / "run", folder / "train.jsonl", "--json").stdout)
    assert {"accuracy", "hamming", "f1", "f1_micro", "nll"} <= set(str(scores).split("'"))
    page = folder / "report.html"
    bhpeft("report", folder / "run", folder / "train.csv", "--out", page)
    text = page.read_text()
    assert "art, sport" in text and "share of wrong labels" in text


def test_a_class_in_brackets_is_no_list(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", text=TEXTS, label=["[spam]", "ham"] * 6)
    task = infer(load(tmp_path / "train.csv"), Reading())
    assert str(task) == "classes: 'label' from 'text', 2 classes ([spam], ham)"
    write_csv(tmp_path / "deep.csv", text=TEXTS, label=["[" * 10**5, "ham"] * 6)
    assert infer(load(tmp_path / "deep.csv"), Reading()).name == "classes"
