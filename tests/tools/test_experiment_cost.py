"""What the benchmark of steps, fits and predictions reports, and that its processes run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
from typer.testing import CliRunner

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_tokenizer
from tools.experiments import cost, serving_cost
from tools.experiments.__main__ import app
from tools.experiments.job import load_frozen
from tools.experiments.steps import METHODS


def _run(out: Path) -> pandas.DataFrame:
    command = ["cost", "--budget", "tiny", "--seeds", "1", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    titles = ("bhpeft predict", "fits in processes", "predictions over a pipeline")
    assert all(f"## {title}" in result.output for title in titles)
    return pandas.read_csv(out / "cost" / "fits-and-predictions.csv", index_col="what")


def test_fits_and_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    for name, rows in {"_TRAINED": 16, "_HELD_OUT": 8, "_PREDICTED": 8, "_ROUNDS": 1}.items():
        monkeypatch.setattr(cost, name, rows)
    monkeypatch.setattr(cost, "_predict", lambda counts: [{"what": "rows", "seconds": 1.0}])
    monkeypatch.setattr(cost, "serving", lambda *_: [{"what": "hybrid", "/ pipeline": 1.0}])
    monkeypatch.setattr(cost, "_processes", lambda work: [{"what": "fit", "ratio": 1.0}])
    table = _run(tmp_path)
    assert table.index.is_unique and len(table) == 17 + len(METHODS)
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
    # One of two layers is skipped, and has no weights; widths hold a gradient for each row.
    memory = table["memory"]
    assert memory["training step, upper half"] < 0.8 < 1 < memory["width"]
    assert memory[[name for name in table.index if name.startswith("fit")]].isna().all()


def test_all_rows_have_as_many_tokens() -> None:
    work = cost._Work(partial(load_frozen, "tiny", "cpu"), 8, 6, 2)
    train, held_out, texts = work.rows
    assert [len(train), len(held_out), len(texts)] == [128, 32, 64]
    assert all((each.tokens.lengths == 6).all() for each in work.rows)
    assert train.labels is not None and set(train.labels.tolist()) == set(range(4))


def test_predictions_over_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def in_turn(runs: Mapping[str, Callable[[], Any]], *_: Any) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        # The pipeline takes 4, 2 and 8 seconds with batches of 1, 8 and 32.
        return {name: [t] for name, t in zip(runs, (4.0, 2.0, 8.0, 1.0, 3.0, 2.0), strict=True)}

    def watched(kind: str, cls: Any, name: str) -> None:
        usual = getattr(cls, name)

        def call(self: Any, texts: Any, *args: Any, **how: Any) -> Any:
            made = usual(self, texts, *args, **how)
            asked.append((kind, len(texts)))
            assert len(made) == len(texts)
            return made

        monkeypatch.setattr(cls, name, call)

    watched("pipeline", serving_cost.TextClassificationPipeline, "__call__")
    watched("ours", bh.Posterior, "predict")
    monkeypatch.setattr(serving_cost, "in_turn", in_turn)
    records = serving_cost.serving(partial(load_frozen, "tiny", "cpu"), 12, 1)
    ratios = {record["what"]: record["/ pipeline"] for record in records}
    assert ratios["pipeline, batches of 8, 12 texts"] == 1
    assert ratios["hybrid, 12 texts"] == 1 and ratios["head only, 1 text"] == 0.5
    assert len(ratios) == 2 * (len(serving_cost.BATCH_SIZES) + len(serving_cost.KINDS))
    once = [("pipeline", 12)] * 3 + [("ours", 12)] * 3
    assert asked == once + [("pipeline", 1)] * 30 + [("ours", 1)] * 30


def test_made_texts_are_as_long_as_news() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    lengths = [len(text.split()) for text in serving_cost.made_texts(tokenizer, 400)]
    assert min(lengths) == 20 and 100 < max(lengths) <= 180 and 50 < sum(lengths) / 400 < 60


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _run(tmp_path)
    rows = pandas.read_csv(tmp_path / "cost" / "bhpeft-predict.csv", index_col="what")
    assert list(rows.index) == ["8 rows", "50 rows", "100 rows"]
    assert (rows["peak memory (MiB)"] > 50).all() and (rows["seconds"] > 0).all()
    assert rows["ms a row"].isna().tolist() == [True, False, False]
    served = pandas.read_csv(tmp_path / "cost" / "predictions-over-a-pipeline.csv")
    assert (served["/ pipeline"] > 0).all() and len(served) == 12
    fits = pandas.read_csv(tmp_path / "cost" / "fits-in-processes.csv")
    assert (fits["two processes / one"] > 0).all() and len(fits) == 2
