"""`bhpeft evaluate` and `bhpeft report`."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from program import TEXTS, bhpeft, error, loaded, write_csv
from saves import backbone_in

from bhpeft_pyro.testing import tiny_backbone


def test_evaluate_as_json_and_as_a_table(folder, posterior):
    expected = posterior.evaluate(str(folder / "train.csv"), 8, seed=3)
    options = ("--samples", 8, "--seed", 3)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", "--json", *options)
    found = json.loads(result.stdout)
    assert found.pop("examples") == 20
    assert found == pytest.approx(expected)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", *options)
    for name, value in expected.items():
        assert re.search(rf"{name}\s+{value:.3f}", result.stdout), name


def test_the_student_is_evaluated_by_default(folder, distilled):
    evaluate = ("evaluate", distilled, folder / "train.csv")
    scores = {}
    for method in ("student", "exact"):
        whole = loaded(distilled, folder)
        scores[method] = whole.evaluate(str(folder / "train.csv"), method=method)
        found = json.loads(bhpeft(*evaluate, "--json", "--method", method).stdout)
        assert found == pytest.approx({"examples": 20, **scores[method]}), method
    assert scores["student"]["nll"] != pytest.approx(scores["exact"]["nll"], rel=1e-4)
    table = bhpeft(*evaluate).stdout
    assert "train.csv; forecasts by the student, 1 pass a text" in " ".join(table.split())
    assert f"{scores['student']['nll']:.3f}" in table
    assert "leave out --samples" in error(*evaluate, "--method", "student", "--samples", 3)


def test_numbers_for_classes_that_have_names_are_noted(folder, tmp_path):
    numbers = write_csv(tmp_path / "numbers.csv", text=TEXTS, label=[0, 1] * 10)
    note = "labels are numbers: 0 stands for 'bad', 1 for 'good' and so on"
    assert note in bhpeft("evaluate", folder / "run", numbers).stderr
    assert note not in bhpeft("evaluate", folder / "run", folder / "train.csv").stderr


def test_reports(folder, posterior, tmp_path):
    page = tmp_path / "report.html"
    arguments = ("report", folder / "run", folder / "train.csv", "--samples", 4)
    bhpeft(*arguments, "--out", page)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 6  # four of the test, the change, the trace
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)  # nothing from elsewhere
    scores = posterior.evaluate(str(folder / "train.csv"), 4)
    for name, value in scores.items():
        assert re.search(rf"<td [^>]*>{name}</td><td [^>]*>{value:.4g}</td>", html), name
    assert str(posterior.report) in unescape(html)
    listed = html[html.index("Least certain") :]
    order = posterior.predict(str(folder / "train.csv"), 4).flag(1.0)[:10].tolist()
    found = re.findall(r'<tr><td [^>]*right">(\d+)</td>', listed)
    assert [int(row) for row in found] == [row + 2 for row in order]  # as in a spreadsheet
    bhpeft("report", folder / "run", "--out", page)
    assert page.read_text().count("data:image/png") == 2


def test_other_backbones_are_refused_and_moved_ones_found(folder, tmp_path):
    other = tiny_backbone()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight += 1
    for name, model in (("other", other), ("moved", tiny_backbone())):
        backbone_in(tmp_path / name, model)
    evaluate = ("evaluate", folder / "run", folder / "train.csv", "--json", "--samples", 2)
    assert "fitted on another one" in error(*evaluate, "--backbone", tmp_path / "other")
    moved = bhpeft(*evaluate, "--backbone", tmp_path / "moved")
    assert moved.stdout == bhpeft(*evaluate).stdout


def test_several_labels(labels: Path, tmp_path: Path) -> None:
    scores = json.loads(bhpeft("evaluate", labels / "run", labels / "train.jsonl", "--json").stdout)
    assert {"accuracy", "hamming", "f1", "f1_micro", "nll"} <= set(str(scores).split("'"))
    page = tmp_path / "report.html"
    bhpeft("report", labels / "run", labels / "train.csv", "--out", page)
    text = page.read_text()
    assert "art, sport" in text and "share of wrong labels" in text
