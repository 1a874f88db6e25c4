"""Validation data during a fit: what is looked at, when, and what is gone back to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.model.likelihoods import HeteroscedasticNormal, Normal
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training import loop


def turned(examples: bh.data.Examples) -> bh.data.Examples:
    """With the opposite labels: whatever is learnt makes these worse."""
    assert examples.labels is not None
    return replace(examples, labels=1 - examples.labels)


def looks(monkeypatch: pytest.MonkeyPatch, *rows: list[float]) -> list[dict[str, Any]]:
    """Let the looks at held-out rows find these NLLs of theirs, one after the other, and return
    what the guide is at each look."""
    found, states = iter(rows), []

    def evaluate(run: Any) -> torch.Tensor:
        states.append({k: v.clone() for k, v in run.guide.state_dict().items()})
        return torch.tensor(next(found))

    monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
    return states


def test_a_fit_of_less_than_an_epoch_is_looked_at_once() -> None:
    rows, others = tiny_examples(64), tiny_examples(64, seed=1)
    options: dict[str, Any] = {"validation": others, "max_steps": 2, "progress": False}
    posterior = bh.fit(tiny_model(()), "normal", rows, **options)
    assert ["validation_nll" in entry for entry in posterior.report.history] == [False, True]


def test_patience_goes_back_to_the_best_state_and_passes_over_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No number is smaller than NaN, so it would be kept for good."""
    states = looks(monkeypatch, [float("nan")], [0.5], [0.7], [0.9])
    rows = tiny_examples(8)
    options: dict[str, Any] = {"validation": tiny_examples(8, seed=1), "patience": 2}
    posterior = bh.fit(tiny_model(()), "normal", rows, max_steps=20, progress=False, **options)
    assert (posterior.report.best_step, posterior.report.steps) == (2, 4)
    assert all(torch.equal(v, states[1][k]) for k, v in posterior.guide.state_dict().items())


def test_without_patience_the_last_state_is_kept() -> None:
    data, bad = tiny_examples(32), turned(tiny_examples(32, seed=3))
    options: dict[str, Any] = {"max_steps": 20, "progress": False}
    looked = bh.fit(tiny_model(()), "normal", data, validation=bad, **options)
    plain = bh.fit(tiny_model(()), "normal", data, **options)
    for name, value in plain.guide.state_dict().items():
        assert torch.equal(value, looked.guide.state_dict()[name])


# Points, of which held-out rows choose the state that is kept

NOISE = [-0.3, -0.1, 0.1, 0.3]  # standard error 0.13
BEST = [0.5] * 4


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ([0.4] * 4, 4),
        ([0.5 + away for away in NOISE], 4),
        ([0.7 + away for away in NOISE], 4),  # worse, by less than two standard errors
        ([0.8 + away for away in NOISE], 2),
        ([0.51] * 4, 2),  # a little worse for every row
        ([float("nan")] * 4, 2),
    ],
)
def test_a_points_last_state_is_kept_unless_an_earlier_one_is_surely_better(
    last: list[float], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = looks(monkeypatch, [0.9] * 4, BEST, [0.6] * 4, last)
    model, rows = tiny_model(()), tiny_examples(8, seed=1)
    options: dict[str, Any] = {"max_steps": 4, "tau": 1.0, "progress": False}
    posterior = bh.fit(
        model, "laplace", tiny_examples(8), validation=rows, components=1, lr=0.1, **options
    )
    assert (posterior.report.best_step, posterior.report.steps) == (kept, 4)
    assert posterior.report.temperature == 0
    for name, value in posterior.guide.named_parameters():
        assert torch.equal(value, states[kept - 1][name]), name
        assert not torch.equal(value, states[5 - kept][name])


def test_a_point_stops_after_three_looks_without_a_better_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worse = [[0.6] * 4] * 3
    states = looks(monkeypatch, [0.9] * 4, [0.7] * 4, [0.8] * 4, [0.8] * 4, BEST, *worse)
    options: dict[str, Any] = {"max_steps": 10, "progress": False}
    data, rows = tiny_examples(8), tiny_examples(8, seed=1)
    posterior = bh.fit(tiny_model(()), "delta", data, validation=rows, **options)
    assert (posterior.report.best_step, posterior.report.steps) == (5, 8)
    for name, value in posterior.guide.named_parameters():
        assert torch.equal(value, states[4][name]), name


def test_ratings_go_on_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state is kept, or an earlier one that is surely better."""
    texts = [f"w{5 + i} w{30 - i}" for i in range(8)]
    data = {"text": texts, "label": [float(i % 4) for i in range(8)]}
    options: dict[str, Any] = {"max_steps": 8, "progress": False}
    unclear, worse = [0.2, 0.8, 0.2, 1.2], [0.6] * 4
    for last, kept in ((unclear, 8), (worse, 2)):
        states = looks(monkeypatch, [0.9] * 4, BEST, *[worse] * 5, last)
        model = tiny_model((), 1, likelihood=Normal())
        posterior = bh.fit(model, "delta", data, validation=tiny_rated(), **options)
        assert (posterior.report.best_step, posterior.report.steps) == (kept, 8)
        for name, value in posterior.guide.named_parameters():
            if "noise" not in name:
                assert torch.equal(value, states[kept - 1][name]), name


def tiny_rated() -> dict[str, list[Any]]:
    return {"text": ["w40 w41", "w42 w43", "w44 w45", "w46 w47"], "label": [0.0, 1.0, 2.0, 3.0]}


def test_a_point_has_ten_looks_and_one_at_its_last_state() -> None:
    rows = tiny_examples(8, seed=1)

    def looked(steps: int, **options: Any) -> list[float]:
        report = bh.fit(
            tiny_model(()),
            "delta",
            tiny_examples(8),
            validation=rows,
            max_steps=steps,
            progress=False,
            **options,
        ).report
        return [entry["step"] for entry in report.history if "validation_nll" in entry]

    assert looked(20) == [*range(2, 21, 2)]
    assert looked(25) == [*range(2, 25, 2), 25]
    assert looked(4) == [1, 2, 3, 4]
    assert looked(20, temperature=1.0) == [*range(1, 21)]  # none is to be chosen: once an epoch


def test_a_point_that_the_prior_pulls_has_its_last_state() -> None:
    """And rows that learnt labels make worse from the first step on choose an early one."""
    bad, data = turned(tiny_examples(32, seed=3)), tiny_examples(32)
    options: dict[str, Any] = {"max_steps": 20, "lr": 0.1, "progress": False}
    fits = [
        bh.fit(tiny_model(()), "delta", data, validation=bad, temperature=t, **options)
        for t in (None, 1.0, 0.0)
    ]
    steps = [fit.report.best_step for fit in fits]
    assert steps[0] is not None and steps[0] < 20 and steps[1:] == [None, None]
    assert [fit.report.temperature for fit in fits] == [0.0, 1.0, 0.0]


def noisy(learnt: int, held_out: int) -> list[dict[str, Any]]:
    """Ratings that are nothing but noise: rows to learn, and others."""
    count = learnt + held_out
    texts = [f"w{5 + i % 40} w{7 + i % 30}" for i in range(count)]
    labels = (2 * torch.randn(count, generator=torch.Generator().manual_seed(0))).tolist()
    parts = slice(learnt), slice(learnt, count)
    return [{"text": texts[part], "label": labels[part]} for part in parts]


@pytest.mark.parametrize("kind", [Normal, HeteroscedasticNormal])
def test_a_point_of_ratings_has_the_noise_of_held_out_rows(kind: Any) -> None:
    """What it has learnt by heart leaves none in the training rows."""
    data, rows = noisy(30, 10)
    model = tiny_model((), kind.outputs, likelihood=kind(spread=2.0), aligned=True)
    options: dict[str, Any] = {"max_steps": 40, "lr": 0.1, "progress": False}
    posterior = bh.fit(model, "delta", data, validation=rows, **options)
    forecast = posterior.predict(rows, 0)
    assert isinstance(forecast, bh.forecast.RatingForecast)
    square = (forecast.mean - torch.tensor(rows["label"])).square()
    assert (square / forecast.aleatoric).mean().item() == pytest.approx(1.0, rel=1e-4)
    nll = 0.5 * (1 + (2 * torch.pi * forecast.aleatoric).log().mean()).item()
    kept = posterior.report.history[(posterior.report.best_step or 0) - 1]
    assert kept["validation_nll"] == pytest.approx(nll, rel=1e-4)
    pulled = bh.fit(model, "delta", data, validation=rows, temperature=1.0, **options)
    memorised = pulled.predict(rows, 0)
    assert memorised.aleatoric.mean() < 0.9 * forecast.aleatoric.mean()


def test_a_noise_that_the_prior_fixes_stays() -> None:
    def prior(sites: Any) -> Any:
        noise = pyro.deterministic("noise.log_scale", torch.tensor(-0.5), event_dim=0)
        normals = {
            site.name: pyro.sample(
                site.name, dist.Normal(0.0, site.unit).expand(site.shape).to_event(site.ndim)
            )
            for site in sites
            if site.name != "noise.log_scale"
        }
        return normals | {"noise.log_scale": noise}

    model = tiny_model((), 1, prior, Normal(0.0, 2.0))
    rows = {
        "text": [f"w{5 + i % 40} w{5 + i // 40}" for i in range(60)],
        "label": [float(i % 5) for i in range(60)],
    }
    posterior = bh.fit(model, "delta", rows, max_steps=3, progress=False)
    forecast = posterior.predict(["w5"])
    assert isinstance(forecast, bh.forecast.RatingForecast)
    assert forecast.aleatoric.item() == pytest.approx(4 * torch.tensor(-1.0).exp().item())


@pytest.mark.parametrize("count", [1, 60])
def test_ratings_that_are_all_the_same_are_learnt(count: int) -> None:
    """They leave no errors, of which the noise would be 0."""
    texts, model = (
        [f"w{5 + i % 40} w{5 + i // 40}" for i in range(count)],
        tiny_model((), 1, likelihood=bh.likelihoods.Normal()),
    )
    rows = {"text": texts, "label": [3.0] * count}
    posterior = bh.fit(model, "laplace", rows, components=1, max_steps=10, progress=False)
    forecast = posterior.predict(texts)
    assert isinstance(forecast, bh.forecast.RatingForecast)
    assert forecast.mean.tolist() == pytest.approx([3.0] * count, abs=1e-3)
    assert 0 < forecast.total.max() < 1e-2


def test_a_few_skewed_ratings_do_not_make_a_fit_too_certain() -> None:
    """A few steps leave the mean near the middle of the scale; the noise is then that of errors."""
    model = bh.tasks.ratings(tiny_backbone(), 1, 5, kinds=(), tokenizer=tiny_tokenizer())
    for ratings in ([5.0] * 39 + [1.0], [5.0] * 40):
        data = {"text": [f"w{5 + i % 30}" for i in range(40)], "label": ratings}
        fitted = bh.fit(model, "laplace", data, components=1, progress=False)
        scores = metrics.evaluate(fitted.predict(data))
        assert scores["mse"] ** 0.5 == pytest.approx(fitted.report.noise, rel=0.05)
        assert scores["coverage_90"] > 0.9


def test_patience_is_not_inherited_without_rows_to_look_at() -> None:
    rows = tiny_examples(8, seed=4)
    options: dict[str, Any] = {"max_steps": 2, "progress": False}
    first = bh.fit(
        tiny_model(()), "normal", tiny_examples(12), validation=rows, patience=2, **options
    )
    new = tiny_examples(12, seed=9)
    assert first.update(new).report.options.patience is None
    assert first.update(new, validation=rows).report.options.patience == 2
    with pytest.raises(ConfigError, match="patience=3 needs validation"):
        first.update(new, patience=3)


def test_a_report_says_what_held_out_rows_were_for() -> None:
    data, rows = tiny_examples(60), tiny_examples(20, seed=3)
    options: dict[str, Any] = {"components": 1, "max_steps": 3, "progress": False}
    point = bh.fit(tiny_model(), "delta", data, validation=rows, **options)
    wide = bh.fit(tiny_model(), "laplace", data, validation=rows, **options)
    later = wide.update(tiny_examples(60, seed=4), validation=rows, max_steps=3)
    assert later.report.temperature == 0 and later.report.best_step is None
    normal = bh.fit(tiny_model(), "normal", data, validation=rows, patience=1, **options)
    for posterior, purpose in (
        (point, "for early stopping"),
        (wide, "for early stopping and the width"),
        (later, "for the width"),
        (normal, "for early stopping"),
    ):
        assert f"20 held-out rows {purpose}\n" in f"{posterior.report}\n"


# Few held-out rows, which would choose by chance


@pytest.mark.parametrize(
    ("rows", "held_out", "steps"),
    [(48, 49, 20), (80, 49, 25), (160, 50, 50), (240, 50, 75)],
)
def test_a_fit_of_classes_is_brief_and_with_few_held_out_rows_keeps_its_end(
    rows: int, held_out: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five epochs, at least twenty steps; with more of them there is a choice of ten."""
    states = looks(monkeypatch, *[[0.5 - 0.01 * k] * 4 for k in range(9)], *[[0.6] * 4] * 3)
    options: dict[str, Any] = {"validation": tiny_examples(held_out, seed=1), "progress": False}
    data = tiny_examples(rows)
    report = bh.fit(tiny_model(), "laplace", data, components=1, tau=1.0, **options).report
    chosen = held_out >= 50
    assert report.steps == steps and report.temperature == 0
    assert report.best_step == (9 * (steps // 10) if chosen else None)
    assert len(states) == (11 if steps == 75 else 10 if chosen else steps // (rows // 16))
    assert not report.falling
    # With a length that is given they choose, however few they are; and for a head alone.
    data = tiny_examples(32)
    for model, given in ((tiny_model(), {"max_steps": 20}), (tiny_model(()), {"epochs": None})):
        looks(monkeypatch, [0.5] * 4, *[[0.6] * 4] * 10)
        report = bh.fit(model, "delta", data, **options, **given).report
        assert report.best_step == report.steps // 4


@pytest.mark.parametrize(("held_out", "steps"), [(49, 20), (50, 60)])
def test_a_fit_of_ratings_is_long_with_many_held_out_rows(held_out: int, steps: int) -> None:
    data, rows = noisy(64, held_out)
    model = tiny_model(outputs=1, likelihood=Normal(spread=2.0), aligned=True)
    posterior = bh.fit(model, "delta", data, validation=rows, progress=False)
    assert posterior.report.steps == steps


def test_a_brief_fit_of_ratings_has_the_noise_of_held_out_rows() -> None:
    data, rows = noisy(48, 32)
    model = tiny_model(outputs=1, likelihood=Normal(spread=2.0), aligned=True)
    posterior = bh.fit(model, "delta", data, validation=rows, lr=0.1, progress=False)
    assert (posterior.report.steps, posterior.report.best_step) == (20, None)
    forecast: Any = posterior.predict(rows, 0)
    square = (forecast.mean - torch.tensor(rows["label"])).square()
    assert (square / forecast.aleatoric).mean().item() == pytest.approx(1.0, rel=1e-4)
