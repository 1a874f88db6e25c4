"""What holds for forecasts of every kind, against loops, scikit-learn and SciPy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from sklearn import metrics as sk
from students import promise_on

from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate

COUNT = 40
KINDS = ("class", "choice", "labels", "rating", "count")
every_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = ["art", "money", "sport"]


def forecast_of(kind: str, rows: Iterable[int] = range(COUNT), **more: Any) -> Any:
    """The same examples, or some of them in some order."""
    at, random = [*rows], torch.Generator().manual_seed(0)
    values = 2 * torch.randn(6, COUNT, 3, generator=random, dtype=torch.float64)
    labels = torch.randint(3, (COUNT,), generator=random)
    known: dict[str, Any] = {"texts": [f"text {row}" for row in at], "labels": labels[at]}
    if kind == "class":
        return ClassForecast.from_draws(
            values.softmax(-1)[:, at], label_names=NAMES, **known | more
        )
    if kind == "choice":
        exist = torch.arange(3) < torch.randint(2, 4, (COUNT, 1), generator=random)
        p = values.masked_fill(~exist, -torch.inf).softmax(-1)
        known["labels"] = (labels % exist.sum(1))[at]
        return ClassForecast.from_draws(p[:, at], choices=exist[at], **known | more)
    if kind == "labels":
        known["labels"] = (torch.rand(COUNT, 3, generator=random) < 0.4).float()[at]
        return LabelsForecast.from_draws(values.sigmoid()[:, at], label_names=NAMES, **known | more)
    mean, sd = values[..., 0], 0.2 + values[..., 1].sigmoid()
    known["labels"] = labels[at].double() + 0.5
    if kind == "count":
        rate = mean.exp().unsqueeze(-1).expand(-1, -1, 20)
        known["outcomes"] = torch.poisson(rate, generator=random)[:, at]
    return RatingForecast.from_draws(mean[:, at], sd[:, at], **known | more)


@every_kind
def test_losses_and_densities_are_those_of_loops(kind: str) -> None:
    forecast = forecast_of(kind)
    loss, wrong, nlls = forecast.loss(forecast.labels), forecast.wrong(0.5), forecast.nlls()
    chance = forecast.chance_right(0.5)
    for n, label in enumerate(forecast.labels):
        if kind in ("class", "choice"):
            p = forecast.probabilities[n]
            expected = [float(p.argmax() != label), -p[label].log(), p.max()]
        elif kind == "labels":
            p, has = forecast.probabilities[n], label.bool()
            right = torch.where(p > 0.5, p, 1 - p).prod()
            density = torch.where(has, p, 1 - p).log().sum()
            expected = [((p > 0.5) != has).double().mean(), -density, right]
        else:
            mean, normals = forecast.means[:, n].mean(), stats.norm(*forecast_parts(forecast, n))
            ends = [normals.cdf(mean + end).mean() for end in (0.5, -0.5)]
            right = ends[0] - ends[1]
            if kind == "count":
                right = ((forecast.outcomes[:, n] - mean).abs() <= 0.5).double().mean()
            expected = [(mean - label) ** 2, -np.log(normals.pdf(label).mean()), right]
        found = [loss[n].item(), nlls[n].item(), chance[n].item()]
        assert found == pytest.approx([float(value) for value in expected], rel=1e-5)
        assert wrong[n] == (loss[n] > 0.25)


def forecast_parts(forecast: RatingForecast, n: int) -> tuple[Any, Any]:
    return forecast.means[:, n].numpy(), forecast.sds[:, n].numpy()


@every_kind
def test_scores_are_scikit_learns(kind: str) -> None:
    forecast = forecast_of(kind)
    scores, truth = evaluate(forecast), forecast.labels.numpy()
    assert scores["nll"] == pytest.approx(forecast.nlls().mean().item())
    if kind in ("rating", "count"):
        expected = {
            "mse": sk.mean_squared_error(truth, forecast.mean),
            "mae": sk.mean_absolute_error(truth, forecast.mean),
            "crps": forecast.crps().mean().item(),
            "coverage_90": forecast.coverage()[0],
        }
    elif kind == "labels":
        guessed, p = forecast.label.numpy(), forecast.probabilities.numpy()
        columns = [(truth[:, k], p[:, k]) for k in range(3)]
        expected = {
            "accuracy": sk.accuracy_score(truth, guessed),
            "hamming": sk.hamming_loss(truth, guessed),
            "f1": sk.f1_score(truth, guessed, average="macro"),
            "f1_micro": sk.f1_score(truth, guessed, average="micro"),
            "nll": sum(sk.log_loss(*column) for column in columns),
            "brier": np.mean([sk.brier_score_loss(*column) for column in columns]),
        }
    else:
        p, names = forecast.probabilities.numpy(), range(3)
        expected = {
            "accuracy": sk.accuracy_score(truth, forecast.label),
            "f1": sk.f1_score(truth, forecast.label, average="macro"),
            "nll": sk.log_loss(truth, p, labels=names),
            "brier": sk.brier_score_loss(truth, p, labels=names, scale_by_half=False),
        }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    bare = replace(forecast, labels=None)
    assert evaluate(bare, forecast.labels) == pytest.approx(scores, nan_ok=True)
    with pytest.raises(DataError, match="labels are needed"):
        evaluate(bare)


@every_kind
def test_the_table_says_what_the_forecast_says(kind: str) -> None:
    forecast = replace(
        forecast_of(kind), novelty=torch.linspace(0.01, 1, COUNT).double(), nearest=["?"] * COUNT
    )
    table = forecast.table(flag=0.1, by="epistemic")
    special = ["sd", "lower_90", "upper_90"] if kind in ("rating", "count") else ["probability"]
    shared = ["epistemic", "aleatoric", "novelty", "reason", "nearest", "answered", "flagged"]
    assert [*table] == ["text", "label", "prediction", *special, *shared]
    assert json.loads(json.dumps(table.to_dict("records")))[3]["text"] == "text 3"
    assert [*table.index] == [*range(COUNT)] and len(Dataset.from_pandas(table)) == COUNT
    assert [*table.index[table["flagged"]]] == sorted(forecast.flag(0.1, "epistemic").tolist())
    assert [*table["reason"]] == forecast.reasons() and [*table["answered"]] == [None] * COUNT
    for name in ("epistemic", "aleatoric", "novelty"):
        assert [*table[name]] == [float(f"{v:.7g}") for v in getattr(forecast, name).tolist()]
    row = table.iloc[5].to_dict()
    if kind in ("rating", "count"):
        ends = [end[5].item() for end in forecast.interval(0.9)]
        assert [row["lower_90"], row["upper_90"]] == pytest.approx(ends, rel=1e-6)
        assert row["prediction"] == pytest.approx(forecast.mean[5].item(), rel=1e-6)
        assert row["label"] == forecast.labels[5] and row["sd"] ** 2 == pytest.approx(
            row["epistemic"] + row["aleatoric"], rel=1e-5
        )
    else:
        assert row["prediction"] == forecast.predicted[5]
        assert row["label"] == forecast.named(forecast.labels)[5]
    if kind == "labels":
        assert row["label"] == [NAMES[k] for k in forecast.labels[5].nonzero()]
        assert row["probability"] == pytest.approx(
            dict(zip(NAMES, forecast.probabilities[5].tolist(), strict=True)), rel=1e-6
        )
    elif kind in ("class", "choice"):
        assert row["probability"] == pytest.approx(forecast.confidence[5].item(), rel=1e-6)
    bare = replace(forecast, labels=None, texts=None, novelty=None, nearest=None)
    assert [*bare.table()] == ["prediction", *special, *shared[:2], "reason", "answered"]


@every_kind
def test_order_and_parts_do_not_matter(kind: str) -> None:
    whole, names = forecast_of(kind), ("loss", "nlls")
    parts = [forecast_of(kind, range(17)), forecast_of(kind, range(17, COUNT))]
    joined, order = type(whole).joined(parts), torch.randperm(COUNT).tolist()
    mixed = forecast_of(kind, order)
    if kind == "count":  # which draws each text its own labels
        mixed = replace(mixed, outcomes=whole.outcomes[:, order])
        joined = replace(joined, outcomes=whole.outcomes)
    for name in names:
        of = [getattr(each, name)(each.labels) for each in (whole, joined, mixed)]
        torch.testing.assert_close(of[1], of[0])
        torch.testing.assert_close(of[2], of[0][order])
    assert joined.table(0.2).equals(whole.table(0.2)) and joined.texts == tuple(whole.texts)
    assert mixed.table(0.2).equals(whole.table(0.2).iloc[order].reset_index(drop=True))
    assert type(whole).joined([whole]) is whole


@every_kind
def test_flags_are_the_least_certain_in_order(kind: str) -> None:
    forecast = forecast_of(kind)
    for by in forecast.measures:
        values = getattr(forecast, by) * (-1 if by == "confidence" else 1)
        order = values.argsort(descending=True, stable=True).tolist()
        for fraction, count in ((1e-9, 1), (0.1, 4), (0.101, 5), (1.0, COUNT)):
            assert forecast.flag(fraction, by=by).tolist() == order[:count]
    novel = replace(forecast, novelty=torch.linspace(1, 0.1, COUNT).double())
    assert novel.flag(0.05, by="novelty").tolist() == [COUNT - 1, COUNT - 2]
    assert int(novel.unlike(0.2).sum()) == int((novel.novelty <= 0.2).sum())
    assert "0 unlike what was learnt" in repr(novel) and "unlike" not in repr(forecast)
    for fraction in (0.0, 1.01, math.nan):
        with pytest.raises(ConfigError, match="fraction"):
            forecast.flag(fraction)
    for by in ("label", "novelty"):
        with pytest.raises(ConfigError, match=f"by='{by}'.*epistemic"):
            forecast.flag(by=by)
    with pytest.raises(DataError, match="novelty"):
        forecast.unlike()


@every_kind
def test_the_reason_is_the_largest_part_unless_the_text_is_novel(kind: str) -> None:
    forecast = replace(forecast_of(kind), novelty=torch.full((COUNT,), 0.5).double())
    forecast.novelty[:3] = 0.05
    doubted = forecast.chance_right() < 0.9
    if kind in ("rating", "count"):
        doubted = forecast.epistemic > forecast.aleatoric
    more = forecast.epistemic > forecast.aleatoric
    little, noise = "little learnt from such texts", "people may differ"
    expected = [
        ("unlike what was learnt" if n < 3 else little if more[n] else noise)
        if doubted[n] or n < 3
        else None
        for n in range(COUNT)
    ]
    assert forecast.reasons() == expected
    threshold = 0.5
    promise = promise_on("class", threshold=threshold, chance=torch.ones(1), answer_unlike=True)
    promised = replace(forecast, promised=promise)
    doubted = forecast.chance_right() <= threshold
    assert [reason is not None for reason in promised.reasons()[3:]] == doubted[3:].tolist()
    assert [*promised.table()["answered"]] == (~doubted).tolist()


def test_disagreement_between_components_is_a_reason_of_its_own() -> None:
    agree, disagree = [0.95, 0.05], [[0.2, 0.8], [0.99, 0.01]]
    other = [[0.8, 0.2], [0.01, 0.99]]
    parts = [ClassForecast.from_draws(torch.tensor([[agree, *rest]])) for rest in (disagree, other)]
    expected = [None, "people may differ", "models disagree"]
    assert ClassForecast.mixed(parts).reasons() == expected
    means, sds = torch.tensor([[0.0, 0.0], [0.1, 4.0]]), torch.full((2, 2), 1.0)
    ratings = RatingForecast.from_draws(means, sds, within=torch.zeros(2, 2))
    assert ratings.reasons() == [None, "models disagree"]


@pytest.mark.parametrize("kind", ["class", "labels"])
def test_a_mixture_is_that_of_all_draws(kind: str) -> None:
    pooled = forecast_of(kind, keep_samples=True)
    draws = pooled.samples
    parts = [type(pooled).from_draws(part, keep_samples=True) for part in draws.split(2)]
    mixed = type(pooled).mixed(parts)
    names = ["probabilities", "total", "aleatoric", "epistemic"]
    for name in [*names, "variance"] if kind == "class" else names:
        torch.testing.assert_close(getattr(mixed, name), getattr(pooled, name), msg=name)
    within = torch.stack([part.epistemic for part in parts]).mean(0)
    torch.testing.assert_close(mixed.between, mixed.epistemic - within, atol=1e-6, rtol=1e-4)
    assert pooled.between is None and torch.equal(mixed.samples, draws)
    if kind == "class":
        assert type(pooled).mixed(parts[:1]) is parts[0]


@every_kind
def test_labels_that_would_be_counted_wrongly_are_refused(kind: str) -> None:
    """Of another shape torch would repeat them; fractions would be cut."""
    forecast = forecast_of(kind)
    several = kind == "labels"
    shapes = [(1, 3), (COUNT,), (COUNT, 1)] if several else [(1,), (COUNT, 1), (COUNT + 1,)]
    for shape in shapes:
        with pytest.raises(DataError, match="labels have shape"):
            forecast.with_labels(torch.zeros(shape))
    if kind in ("class", "choice", "labels"):
        for value in (0.5, -1, 3, math.nan):
            with pytest.raises(DataError, match="labels"):
                forecast.with_labels(torch.full_like(forecast.labels, value, dtype=torch.float))
    else:
        with pytest.raises(ValueError, match="NaN"):
            evaluate(forecast, [math.nan] * COUNT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_draws_that_are_no_distribution_are_refused(value: float) -> None:
    p = torch.full((3, 5, 2), 0.5)
    p[1, 2, 0] = value
    for kind in (ClassForecast, LabelsForecast):
        with pytest.raises(LikelihoodError, match="sum to one"):
            kind.from_draws(p)
    with pytest.raises(LikelihoodError, match="sd positive"):
        RatingForecast.from_draws(torch.zeros(3, 5), p[..., 0])
    with pytest.raises(LikelihoodError, match=r"softmax|\(S, N, C\)"):
        ClassForecast.from_draws(torch.randn(3, 5, 2))
    with pytest.raises(LikelihoodError, match=r"\(S, N, C\)"):
        ClassForecast.from_draws(p[0].abs().softmax(-1))
