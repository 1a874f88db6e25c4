"""Methods compared on the same rows: the numbers, what is saved, and going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pyro.distributions as dist
import pytest
import saves
import torch

import bhpeft_pyro as bh
from bhpeft_pyro import comparison
from bhpeft_pyro.diagnostics.comparison import BASELINE, Comparison, compare
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import RatingForecast
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

HOW = bh.FitOptions(max_steps=3, progress=False)


def parts(data: bh.data.Examples) -> tuple[bh.data.Examples, bh.data.Examples, bh.data.Examples]:
    return data.subset(range(24)), data.subset(range(24, 36)), data.subset(range(36, 48))


@pytest.fixture(scope="module")
def data() -> tuple[bh.data.Examples, bh.data.Examples, bh.data.Examples]:
    return parts(tiny_examples(48))


@pytest.fixture(scope="module")
def made(
    data: tuple[bh.data.Examples, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compared")
    return compare(tiny_model, *data, out, components=2, options=HOW), out


def test_the_table_is_of_the_saved_posteriors(
    made: tuple[Comparison, Path], data: tuple[bh.data.Examples, ...]
) -> None:
    found, out = made
    table = found.table()
    for folder, method in (
        ("head-only", "head only"),
        ("LoRA", "LoRA"),
        ("points", "ensemble of 2"),
        ("posterior", "posterior (2 components)"),
    ):
        saved = saves.load(out / folder)
        scores = saved.evaluate(data[2])
        assert table.loc[method, ["accuracy", "nll"]].tolist() == pytest.approx(
            [scores["accuracy"], scores["nll"]]
        )
    assert table["nll difference"].to_dict() == pytest.approx(
        {name: table.loc[name, "nll"] - table.loc[BASELINE, "nll"] for name in table.index}
        | {BASELINE: float("nan")},
        nan_ok=True,
    )
    away = found.forecasts["LoRA"].nlls() - found.forecasts[BASELINE].nlls()
    half = 1.96 * away.std().item() / len(away) ** 0.5
    ends = away.mean().item() - half, away.mean().item() + half
    assert table.loc["LoRA", ["low", "high"]].tolist() == pytest.approx(ends)


def test_it_goes_on_under_a_prior_of_one_s_own(
    data: tuple[bh.data.Examples, ...], tmp_path: Path
) -> None:
    def own(kinds: Any) -> bh.Model:
        return tiny_model(kinds, prior={"*": dist.Normal(0.0, 0.5)})

    one, other = (compare(own, *data, tmp_path, components=2, options=HOW) for _ in range(2))
    assert one.table()["nll"].to_dict() == pytest.approx(other.table()["nll"].to_dict())


def test_the_posterior_is_around_the_very_points(made: tuple[Comparison, Path]) -> None:
    found, _ = made
    points, wide = (found.posteriors[name] for name in ("points", "posterior"))
    for one, other in zip(points.components, wide.components, strict=True):  # type: ignore[attr-defined]
        for name, mean in one.guide.means().items():
            assert torch.equal(mean, other.guide.means()[name])


def test_it_goes_on_where_it_was_interrupted(
    made: tuple[Comparison, Path],
    data: tuple[bh.data.Examples, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits: list[int] = []
    plain = comparison.fit

    def fit(model: bh.Model, *args: Any, **kwargs: Any) -> bh.Posterior:
        if len(fits) == 2:
            raise KeyboardInterrupt
        fits.append(len(model.network.kinds))
        return plain(model, *args, **kwargs)

    monkeypatch.setattr(comparison, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_model, *data, tmp_path, components=2, options=HOW)
    monkeypatch.setattr(comparison, "fit", plain)
    said: list[str] = []
    again = compare(tiny_model, *data, tmp_path, components=2, options=HOW, say=said.append)
    assert [line.split()[0] for line in said] == ["fewer", "head", "LoRA", "fitting", "measuring"]
    assert said[0].startswith("fewer than 30 validation or test rows: temperatures and intervals")
    first = made[0].table().drop(columns="seconds")
    pandas.testing.assert_frame_equal(again.table().drop(columns="seconds"), first, rtol=1e-5)


def test_a_comparison_made_otherwise_is_not_continued(
    made: tuple[Comparison, Path], data: tuple[bh.data.Examples, ...]
) -> None:
    """Its points were fitted to its training rows, and stopped by its validation rows."""
    _, out = made
    train, validation, test = data
    as_made: dict[str, Any] = {"components": 2, "options": HOW}
    for rows, other, changed in (
        (data, {"options": HOW.change(max_steps=4)}, "max_steps"),
        (data, {"components": 3}, "components"),
        ((train.subset(range(20)), validation, test), {}, "data"),
        ((train, validation.subset(range(8)), test), {}, "validation"),
    ):
        with pytest.raises(ConfigError, match=f"another choice of {changed};"):
            compare(tiny_model, *rows, out, **(as_made | other))
    with pytest.raises(ConfigError, match="components=1"):
        compare(tiny_model, *data, out, components=1)
    with pytest.raises(DataError, match="test: 1 row; expected 2 or more"):
        compare(tiny_model, train, validation, test.subset([0]), out, **as_made)


def test_other_test_rows_are_predicted_by_what_is_saved(
    made: tuple[Comparison, Path], data: tuple[bh.data.Examples, ...]
) -> None:
    found, out = made
    train, validation, test = data
    half = test.subset(range(6))
    again = compare(tiny_model, train, validation, half, out, components=2, options=HOW)
    first = found.forecasts["LoRA"].nlls()[:6]
    assert torch.allclose(again.forecasts["LoRA"].nlls(), first, atol=1e-5)


def test_posteriors_of_something_else_are_not_compared(
    made: tuple[Comparison, Path], data: tuple[bh.data.Examples, ...], tmp_path: Path
) -> None:
    for name, folder in (("inside", "inside/LoRA"), ("itself", "itself")):
        made[0].posteriors["LoRA"].save(tmp_path / folder)
        with pytest.raises(ConfigError, match="something else"):
            compare(tiny_model, *data, tmp_path / name, components=2, options=HOW)


def test_ratings_are_compared_without_scaling(tmp_path: Path) -> None:
    """Their noise suits the validation rows already."""
    table = {
        "text": [f"w{i} w{i + 1}" for i in range(48)],
        "label": [1 + i % 9 / 2 for i in range(48)],
    }
    rows = bh.data.encode(table, tiny_tokenizer(), kind="rating")

    def model(kinds: Sequence[bh.peft.Kind]) -> bh.Model:
        return bh.tasks.ratings(tiny_backbone(), 1, 5, kinds=kinds, tokenizer=tiny_tokenizer())

    found = compare(model, *parts(rows), tmp_path, components=2, options=HOW)
    assert list(found.forecasts) == [
        "head only",
        "LoRA",
        "hybrid",
        "ensemble of 2",
        "posterior (2 components)",
    ]
    assert "mse" in found.table() and isinstance(found.forecasts["LoRA"], RatingForecast)

    def other(kinds: Sequence[bh.peft.Kind]) -> bh.Model:
        network = bh.RandomPEFT(tiny_backbone(), kinds, bh.Head(1), tiny_tokenizer())
        return bh.Model(network, likelihood=bh.likelihoods.Normal())

    with pytest.raises(ConfigError, match="another choice of random weights, likelihood;"):
        compare(other, *parts(rows), tmp_path, components=2, options=HOW)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match=r"out: .*comparison\.json cannot be read"):
        compare(model, *parts(rows), tmp_path, components=2, options=HOW)


def test_the_verdict_is_a_sentence_about_the_default(made: tuple[Comparison, Path]) -> None:
    found, _ = made
    table = found.table()
    change = table.loc["posterior (2 components)", "accuracy"] - table.loc["LoRA", "accuracy"]
    times = found.seconds["posterior (2 components)"] / found.seconds["LoRA"]
    said = found.verdict()
    assert said.startswith("the posterior (2 components) beside LoRA, with standard errors: acc")
    assert f"accuracy {change:+.3f} ± " in said and f"{times:.1f} times as long" in said
    gain = found.forecasts["posterior (2 components)"].nlls() - found.forecasts["LoRA"].nlls()
    error = gain.std() / len(gain) ** 0.5
    assert f"NLL {gain.mean():+.3f} ± {error:.3f} (" in said
