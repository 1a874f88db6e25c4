"""The comparison command: disjoint splits, restart, and tables from the files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

import bhpeft_pyro as bh
from bhpeft_pyro.experiments import arms, compare, data, head_scale
from bhpeft_pyro.experiments.data import Task, split
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

TASK = Task("toy", 12, 2, bh.likelihoods.Categorical)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"w{5 + i % 2} w{10 + i}", "label": i % 2} for i in range(36)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_splits_share_no_row_and_depend_on_the_seed(folder: Path) -> None:
    parts = split(folder, TASK, 0, validation=8, test=8)
    texts = [set(part["text"]) for part in (parts.train, parts.validation, parts.test)]
    assert [len(each) for each in texts] == [12, 8, 8]
    assert len(set.union(*texts)) == 28
    assert split(folder, TASK, 1, validation=8, test=8).test["text"] != parts.test["text"]
    with pytest.raises(bh.errors.DataError, match="36 rows, the task needs 52"):
        split(folder, TASK, 0, validation=20, test=20)


def test_arms_run_and_scaling_changes_calibration_only(folder: Path, backbone: Path) -> None:
    rows = split(folder, TASK, 0, validation=8, test=8)
    results = {
        name: arms.run_arm(arm, TASK, rows, backbone, seed=0, epochs=2, samples=2)
        for name, arm in arms.ARMS.items()
    }
    plain, scaled = results["deterministic"]["as is"], results["deterministic"]["scaled"]
    assert scaled["accuracy"] == plain["accuracy"]
    assert scaled["nll"] != plain["nll"]
    for name in ("Bayesian", "head only, Bayesian"):
        assert results[name]["as is"]["mutual_information"] > 0 == plain["mutual_information"]


def test_scaled_ratings_have_unit_standardised_errors_on_the_validation_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, labels = torch.zeros(1, 500), 3 * torch.randn(500, generator=generator)
    forecast = bh.RatingForecast.from_draws(mean, torch.ones(1, 500), labels=labels)
    scaled = arms._scaled(forecast, forecast)
    assert isinstance(scaled, bh.RatingForecast)
    assert torch.allclose(scaled.sd, labels.square().mean().sqrt().expand(500))


def test_a_killed_comparison_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def run_arm(*args: Any) -> dict[str, dict[str, float]]:
        seed = args[4]
        if seed == 1 and 1 not in calls:
            calls.append(seed)
            raise KeyboardInterrupt
        calls.append(seed)
        return {key: {"accuracy": 0.5 + seed, "nll": 1.0} for key in ("as is", "scaled")}

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "minilm", lambda: Path("minilm/model"))
    monkeypatch.setitem(data.TASKS, "toy", TASK)
    out = folder / "out"
    options: dict[str, Any] = {"seeds": 3, "epochs": 1, "samples": 2, "validation": 8, "test": 8}
    with pytest.raises(KeyboardInterrupt):
        compare.compare(folder, out, ["toy"], ["Bayesian"], **options)
    compare.compare(folder, out, ["toy"], ["Bayesian"], **options)
    assert calls == [0, 1, 1, 2]
    results = [json.loads(file.read_text()) for file in sorted(out.glob("toy.*.json"))]
    console = Console(width=120, record=True)
    console.print(compare.table(results))
    assert "1.500 ± 0.577" in console.export_text()  # mean of 0.5, 1.5, 2.5 and 1 / sqrt(3)


def test_the_head_scale_table_shows_what_fit_finds_and_what_was_fixed(
    folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(head_scale, "minilm", lambda: backbone)
    monkeypatch.setattr(head_scale, "SCALES", (None, 3.0))
    monkeypatch.setitem(data.TASKS, "toy", TASK)
    head_scale.head_scale(folder, ["toy"], seeds=2, epochs=2, test=8)
    lines = capsys.readouterr().out.splitlines()
    fixed = next(line for line in lines if "fixed" in line)
    found = next(line for line in lines if "found by fit" in line)
    assert "3.000 ± 0.000" in fixed
    assert float(found.split("|")[2].split()[0]) >= 1.0
    with pytest.raises(typer.BadParameter, match="unknown: tale; known: news"):
        head_scale.head_scale(folder, ["tale"])
