"""What the benchmark of steps, fits and predictions reports, and that its process runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

from tools.experiments import cost
from tools.experiments.__main__ import app
from tools.experiments.job import load_frozen


def _run(out: Path) -> pandas.DataFrame:
    command = ["cost", "--budget", "tiny", "--seeds", "1", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "## bhpeft predict" in result.output
    return pandas.read_csv(out / "cost-tables" / "fits-and-predictions.csv", index_col="what")


def test_fits_and_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    for name, rows in {"_TRAINED": 16, "_HELD_OUT": 8, "_PREDICTED": 8, "_ROUNDS": 1}.items():
        monkeypatch.setattr(cost, name, rows)
    monkeypatch.setattr(cost, "_predict", lambda counts: [{"what": "rows", "seconds": 1.0}])
    table = _run(tmp_path)
    assert table.index.is_unique and len(table) == 17
    steps, ratio = table["steps"], table["/ delta"].dropna()
    assert ratio.to_dict() == {
        f"fit, laplace{which}": pytest.approx(
            steps[f"fit, laplace{which}"] / steps[f"fit, delta{which}"]
        )
        for which in ("", ", upper half", ", 2 components")
    }
    assert steps["training step"] == 1
    peer = "training step, LoRA of Hugging Face peft"
    of_peft = table["steps of HF peft's LoRA"]
    assert of_peft[peer] == 1


def test_all_rows_have_as_many_tokens() -> None:
    work = cost._Work(partial(load_frozen, "tiny", "cpu"), 8, 6, 2)
    train, held_out, texts = work.rows
    assert [len(train), len(held_out), len(texts)] == [128, 32, 64]
    assert all((each.tokens.lengths == 6).all() for each in work.rows)
    assert train.labels is not None and set(train.labels.tolist()) == set(range(4))


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _run(tmp_path)
    rows = pandas.read_csv(tmp_path / "cost-tables" / "bhpeft-predict.csv", index_col="what")
    assert list(rows.index) == ["8 rows", "50 rows", "100 rows"]
    assert (rows["peak memory (MiB)"] > 50).all() and (rows["seconds"] > 0).all()
    assert rows["ms a row"].isna().tolist() == [True, False, False]
