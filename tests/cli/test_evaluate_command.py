"""`bhpeft evaluate` and `bhpeft report`."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from program import NAMES, TEXTS, bhpeft, error, loaded, write_csv, write_lines
from saves import backbone_in

from bhpeft_pyro.errors import BHPEFTWarning
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.testing import tiny_backbone


def test_evaluate_as_json_and_as_a_table(folder, posterior):
    expected = metrics.evaluate(posterior.predict(str(folder / "train.csv"), 8, seed=3))
    options = ("--samples", 8, "--seed", 3)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", "--json", *options)
    found = json.loads(result.stdout)
    assert [found.pop(name) for name in ("examples", "learnt")] == [20, 20]
    assert found == pytest.approx(expected)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", *options)
    for name, value in expected.items():
        assert re.search(rf"{name}\s+{value:.3f}", result.stdout), name


def test_the_student_is_evaluated_by_default(folder, distilled):
    evaluate = ("evaluate", distilled, folder / "train.csv")
    scores = {}
    for method in ("student", "exact"):
        whole = loaded(distilled, folder)
        scores[method] = metrics.evaluate(whole.predict(str(folder / "train.csv"), method=method))
        found = json.loads(bhpeft(*evaluate, "--json", "--method", method).stdout)
        assert found == pytest.approx({"examples": 20, "learnt": 20, **scores[method]}), method
    assert scores["student"]["nll"] != pytest.approx(scores["exact"]["nll"], rel=1e-4)
    table = bhpeft(*evaluate).stdout
    told = "train.csv, 20 of them learnt or held out; forecasts by the student, 1 pass a text"
    assert told in " ".join(table.split())
    assert f"{scores['student']['nll']:.3f}" in table
    assert "expected no samples=3" in error(*evaluate, "--method", "student", "--samples", 3)


NEW = {"text": ["w5 w33 w8", "w6 w35", "w9 w34"], "label": ["bad", "good", "bad"]}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three new rows among eight that were learnt, in other letters."""
    texts = [*TEXTS[:4], *NEW["text"], *map(str.upper, TEXTS[4:8])]
    return write_csv(
        tmp_path / "mixed.csv", text=texts, label=NAMES[:4] + NEW["label"] + NAMES[4:8]
    )


def test_what_is_new_is_scored_apart_from_what_was_learnt(folder, posterior, mixed):
    """Of the sample's april.csv after its update nothing was said: 0.933, all rows known."""
    evaluate = ("evaluate", folder / "run", mixed, "--samples", 8)
    told = "8 of 11 rows were learnt or held out"
    result = bhpeft(*evaluate, "--json")
    found, new = json.loads(result.stdout), posterior.evaluate(NEW, 8)
    assert told in result.stderr and found["learnt"] == 8
    assert found["new"] == pytest.approx({"examples": 3, **new})
    with pytest.warns(BHPEFTWarning, match=told):
        scores = posterior.evaluate(str(mixed), 8)
    assert found["nll"] == pytest.approx(scores["nll"])
    assert {name: scores[f"new/{name}"] for name in new} == pytest.approx(new)
    table = bhpeft(*evaluate)
    assert table.stderr.count(told) == 1
    assert re.search(rf"nll\s+{scores['nll']:.3f}\s+{new['nll']:.3f}", table.stdout)
    assert "8 of them learnt or held out" in " ".join(table.stdout.split())


def test_a_file_of_new_rows_is_scored_without_a_note(folder, tmp_path):
    result = bhpeft("evaluate", folder / "run", write_csv(tmp_path / "new.csv", **NEW), "--json")
    assert "learnt" not in result.stderr
    found = json.loads(result.stdout)
    assert found["learnt"] == 0 and "new" not in found


def test_reports_show_what_is_new_first(folder, posterior, mixed, tmp_path):
    page = tmp_path / "report.html"
    report = ("report", folder / "run", mixed, "--samples", 8, "--out", page)
    assert "8 of 11 rows were learnt or held out" in bhpeft(*report).stderr
    new, all_rows = re.split(r"<h2>On ", page.read_text())[1:]
    assert new.startswith(f"the 3 new rows of {mixed}")
    assert all_rows.startswith(f"11 rows of {mixed}, 8 learnt or held out")
    assert f">{posterior.evaluate(NEW, 8)['nll']:.4g}</td>" in new
    rows = re.findall(r'<tr><td [^>]*right">(\d+)</td>', new[new.index("Least certain") :])
    assert sorted(map(int, rows)) == [6, 7, 8]  # in the file, after the header


def test_numbers_for_classes_that_have_names_are_noted(folder, tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    numbers = write_lines(tmp_path / "numbers.jsonl", rows)
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
    scores = metrics.evaluate(posterior.predict(str(folder / "train.csv"), 4))
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
        other.encoder.layer[0].output.dense.weight[0] += 1
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
