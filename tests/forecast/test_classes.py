"""Forecasts of classes against loops and known cases; temperature scaling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from students import promise_on
from torch import Tensor

from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate


def some_draws(draws: int = 7, count: int = 30, classes: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(draws, count, classes, generator=generator)).softmax(-1)


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def test_a_mixture_is_that_of_all_draws():
    draws = some_draws(6)
    parts = [ClassForecast.from_draws(part, keep_samples=True) for part in draws.split(2)]
    mixed, pooled = ClassForecast.mixed(parts), ClassForecast.from_draws(draws)
    for name in ("probabilities", "total", "aleatoric", "epistemic", "variance"):
        torch.testing.assert_close(getattr(mixed, name), getattr(pooled, name), msg=name)
    within = torch.stack([part.epistemic for part in parts]).mean(0)
    torch.testing.assert_close(mixed.between, mixed.epistemic - within, atol=1e-6, rtol=1e-4)
    assert mixed.draws == 6 and ClassForecast.mixed(parts[:1]) is parts[0]
    assert torch.equal(mixed.samples, draws)
    assert ClassForecast.mixed([ClassForecast.from_draws(draws)] * 2).samples is None


def test_decomposition_is_that_of_a_loop():
    draws = some_draws()
    forecast = ClassForecast.from_draws(draws)
    for n in range(draws.shape[1]):
        rows = draws[:, n].double().tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        aleatoric = sum(entropy(row) for row in rows) / len(rows)
        variance = sum(
            (row[k] - mean[k]) ** 2 / len(rows) for row in rows for k in range(len(mean))
        )
        assert forecast.probabilities[n].tolist() == pytest.approx(mean, rel=1e-6)
        assert forecast.total[n].item() == pytest.approx(entropy(mean), rel=1e-6)
        assert forecast.aleatoric[n].item() == pytest.approx(aleatoric, rel=1e-6)
        assert forecast.epistemic[n].item() == pytest.approx(entropy(mean) - aleatoric, abs=1e-6)
        assert forecast.variance[n].item() == pytest.approx(variance, rel=1e-5)
        assert forecast.label[n].item() == mean.index(max(mean))
        assert forecast.confidence[n].item() == pytest.approx(max(mean), rel=1e-6)


def test_equal_draws_have_no_epistemic_uncertainty_at_all():
    draws = some_draws(1).expand(9, -1, -1)
    forecast = ClassForecast.from_draws(draws)
    assert (forecast.epistemic == 0).all()
    assert (forecast.variance == 0).all()
    assert torch.equal(forecast.probabilities, draws[0])


def test_one_hot_draws_that_disagree_have_no_aleatoric_uncertainty():
    draws = torch.eye(4)[:, None, :]  # draw s is sure of class s
    forecast = ClassForecast.from_draws(draws)
    assert forecast.aleatoric.item() == 0
    assert forecast.epistemic.item() == pytest.approx(math.log(4))
    assert forecast.variance.item() == pytest.approx(4 * (0.25 - 0.25**2))


def test_ragged_choices_have_the_uncertainty_of_the_choices_that_exist():
    draws = some_draws(classes=3)
    padded = torch.nn.functional.pad(draws, (0, 2))
    choices = torch.tensor([True, True, True, False, False]).expand(30, 5)
    forecast = ClassForecast.from_draws(padded, choices=choices)
    expected = ClassForecast.from_draws(draws)
    for name in ("total", "aleatoric", "epistemic", "variance", "label", "confidence"):
        torch.testing.assert_close(getattr(forecast, name), getattr(expected, name))


@pytest.mark.parametrize("by", ["epistemic", "aleatoric", "total", "variance", "confidence"])
def test_flag_puts_the_least_certain_first(by):
    forecast = ClassForecast.from_draws(some_draws(count=100))
    values = getattr(forecast, by) * (-1 if by == "confidence" else 1)
    expected = values.argsort(descending=True, stable=True).tolist()
    assert 0.07 * 100 > 7  # rounded up, but not for rounding errors
    for fraction, count in ((0.07, 7), (0.071, 8), (1.0, 100)):
        assert forecast.flag(fraction, by=by).tolist() == expected[:count]

    ties = ClassForecast.from_draws(torch.full((2, 50, 2), 0.5))
    assert ties.flag(1.0, by=by).tolist() == list(range(50))  # in order


def test_fractions_and_measures_that_cannot_be_are_refused_by_name():
    forecast = ClassForecast.from_draws(some_draws())
    for fraction in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ConfigError, match="fraction"):
            forecast.flag(fraction)
    with pytest.raises(ConfigError, match=r"by='entropy'.*epistemic"):
        forecast.flag(by="entropy")
    with pytest.raises(ConfigError, match="by='confidence'"):
        RatingForecast.from_draws(torch.zeros(1, 2), torch.ones(1, 2)).flag(by="confidence")


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        (torch.randn(3, 5, 4), "softmax"),
        (torch.full((3, 5, 4), 0.3), "sum to one"),
        (torch.full((3, 5, 4), math.nan), "sum to one"),
        (torch.tensor([[[1.5, -0.5]]]), ">= 0"),
        (torch.full((5, 4), 0.25), r"\(S, N, C\)"),
        (torch.full((0, 5, 4), 0.25), r"\(S, N, C\)"),
        (torch.ones(3, 5, 1), "C >= 2"),
        (torch.ones(3, 5, 2, dtype=torch.long), "floating"),
    ],
)
def test_draws_that_are_no_probabilities_are_refused(draws, words):
    with pytest.raises(LikelihoodError, match=words):
        ClassForecast.from_draws(draws)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": torch.zeros(29, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.full((30,), 0.5)}, "whole numbers .class indices., got 0.5"),
        ({"labels": torch.full((30,), math.nan)}, "finite"),
        ({"labels": [4] * 30}, r"0\.\.3, got 4"),
        ({"labels": [-1] * 30}, r"got -1"),
        ({"labels": ["good"] * 30}, "labels must be numbers"),
        ({"texts": ["a"]}, "texts has 1"),
        ({"label_names": ["a", "b"]}, "label_names has 2 names for 4"),
        ({"choices": torch.ones(30, 3, dtype=torch.bool)}, "choices has shape"),
    ],
)
def test_what_does_not_go_with_the_draws_is_refused(options, words):
    with pytest.raises(DataError, match=words):
        ClassForecast.from_draws(some_draws(), **options)


def test_what_is_no_sequence_is_refused_by_name() -> None:
    draws = torch.full((1, 1, 2), 0.5)
    array: Any = draws.numpy()
    with pytest.raises(ConfigError, match="expected a tensor"):
        ClassForecast.from_draws(array)
    for name in ("texts", "label_names", "choices", "keep_samples"):
        with pytest.raises(ConfigError, match=name):
            ClassForecast.from_draws(draws, **{name: 1.0})
    for each, number in ((LabelsForecast, draws), (RatingForecast, draws[..., 0])):
        given = [number] * (1 + (each is RatingForecast))
        with pytest.raises(ConfigError, match=r"texts: expected a text for each example, got 1.0"):
            each.from_draws(*given, texts=1.0)
        with pytest.raises(ConfigError, match="expected a tensor"):
            each.from_draws(*(value.numpy() for value in given))
    named = ClassForecast.from_draws(draws, label_names=("a", "b"))
    for labels in (pd.NA, 3, np.int64(3)):
        with pytest.raises(ConfigError, match="labels: expected a label for each example, got"):
            named.with_labels(labels)


def test_classes_may_be_whole_floats() -> None:
    """As pandas reads a column with gaps, and scikit-learn takes them."""
    forecast = ClassForecast.from_draws(some_draws(), labels=[1.0, 2.0, 0.0] * 10)
    assert forecast.observed().tolist() == [1, 2, 0] * 10


BACKWARDS = np.array([3, 0, 2])[::-1]


@pytest.mark.parametrize(
    ("names", "every", "other"),
    [
        (
            "abcd",
            [["c", "a", "d"], np.array([*"cad"]), BACKWARDS, BACKWARDS.astype(object), (2, 0, 3)],
            ["a", "b", "e"],
        ),
        # Names that are numbers are names, as in `Posterior.evaluate`.
        ("1234", [["3", "1", "4"], [3, 1, 4], np.array([3, 1, 4]), (3.0, 1.0, 4.0)], [1, 2, 0]),
    ],
)
def test_labels_of_any_kind(names: str, every: list[Any], other: list[Any]) -> None:
    forecast = ClassForecast.from_draws(some_draws()[:, :3], label_names=[*names])
    for labels in (*every, torch.tensor([2, 0, 3])):
        assert forecast.with_labels(labels).observed().tolist() == [2, 0, 3]
    expected = rf"labels: '{other[2]}' is not one of \('{names[0]}', '{names[1]}', "
    with pytest.raises(DataError, match=expected):
        forecast.with_labels(other)


def test_choices_that_do_not_exist_have_no_probability_and_are_no_labels():
    choices = torch.tensor([True, True, True, False]).expand(30, 4)
    with pytest.raises(LikelihoodError, match="choices"):
        ClassForecast.from_draws(some_draws(), choices=choices)
    padded = torch.nn.functional.pad(some_draws(classes=3), (0, 1))
    with pytest.raises(DataError, match="choice that does not exist"):
        ClassForecast.from_draws(padded, choices=choices, labels=[3] * 30)


def test_half_precision_draws_are_taken_and_summed_in_full():
    draws = some_draws(64).bfloat16()
    forecast = ClassForecast.from_draws(draws)
    assert forecast.probabilities.dtype == torch.float32
    torch.testing.assert_close(forecast.probabilities, draws.float().mean(0))


def test_forecasts_are_detached_and_frozen():
    forecast = ClassForecast.from_draws(some_draws().requires_grad_(), keep_samples=True)
    assert forecast.samples is not None
    assert not forecast.probabilities.requires_grad
    assert not forecast.samples.requires_grad
    with pytest.raises(AttributeError):
        forecast.draws = 3  # type: ignore[misc]


def test_class_rows_as_a_dataset():
    texts = [f"text {n}" for n in range(30)]
    names = ["World", "Sports", "Business", "Sci/Tech"]
    forecast = ClassForecast.from_draws(
        some_draws(), labels=torch.arange(30) % 4, texts=texts, label_names=names
    )
    dataset = forecast.to_dataset()
    row = dataset[17]
    assert len(dataset) == 30
    assert row["text"] == "text 17"
    assert dataset.features["label"].int2str(row["label"]) == "Sports"
    assert row["prediction"] == forecast.label[17].item()
    assert forecast.predicted[17] == names[row["prediction"]]
    assert ClassForecast.from_draws(some_draws()).predicted == forecast.label.tolist()
    assert row["probabilities"] == pytest.approx(forecast.probabilities[17].tolist())
    for name in ("confidence", "total", "aleatoric", "epistemic", "variance"):
        assert row[name] == pytest.approx(getattr(forecast, name)[17].item())
    assert "label" not in ClassForecast.from_draws(some_draws()).to_dataset().column_names


def test_summaries_state_sizes_and_the_decomposition():
    draws = torch.eye(4)[:, None, :]
    text = repr(ClassForecast.from_draws(draws))
    assert "1 examples, 4 classes, 4 draws" in text
    assert "1.3863 = 0.0000 aleatoric + 1.3863 epistemic" in text
    text = repr(RatingForecast.from_draws(torch.tensor([[1.0], [3.0]]), torch.full((2, 1), 0.5)))
    assert "1 examples, 2 draws" in text
    assert "1.2500 = 0.2500 aleatoric + 1.0000 epistemic" in text


# Temperature scaling


def forecast_of(logits: Tensor, labels: Tensor | None = None) -> ClassForecast:
    return ClassForecast.from_draws(logits.softmax(-1)[None], labels=labels)


def planted(temperature: float, count: int = 20_000) -> ClassForecast:
    """A forecast that is calibrated once its logits are divided by `temperature`."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return forecast_of(temperature * logits, labels)


def fitted(logits: Tensor, labels: list[int]) -> float:
    forecast = forecast_of(logits, torch.tensor(labels))
    return forecast.tempered(forecast)[1]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_planted_temperatures_are_recovered_and_no_other_is_better(temperature):
    forecast = planted(temperature)
    mended, best = forecast.tempered(forecast)
    assert best == pytest.approx(temperature, rel=0.03)
    for factor in (0.5, 0.98, 0.999, 1.001, 1.02, 2.0):
        other = forecast_of(forecast.log_probabilities / (factor * best), forecast.labels)
        assert evaluate(other)["nll"] > evaluate(mended)["nll"]


@pytest.mark.parametrize(("size", "right"), [(4.0, 3), (0.1, 19), (0.3, 99), (30.0, 8), (60.0, 8)])
def test_closed_form_of_two_classes(size, right):
    # The best T has sigmoid(size / T) = right / (right + 1). A descent from T = 1 that is cut off
    # at the limits gets stuck at them.
    logits = torch.tensor([[size, 0.0]] * (right + 1), dtype=torch.float64)
    found = fitted(logits, [0] * right + [1])
    assert found == pytest.approx(size / math.log(right), rel=1e-5)


def test_accuracy_stays_and_a_temperature_above_one_makes_it_less_confident():
    forecast = planted(2.0, count=2000)
    mended, _ = forecast.tempered(forecast)
    assert torch.equal(mended.label, forecast.label)
    assert (mended.confidence <= forecast.confidence).all()
    assert (mended.epistemic == 0).all()


def test_choices_that_do_not_exist_take_no_part():
    forecast = planted(2.0, count=500)
    probabilities = torch.nn.functional.pad(forecast.probabilities, (0, 2))
    padded = ClassForecast.from_draws(
        probabilities[None], labels=forecast.labels, choices=probabilities > 0
    )
    mended, temperature = padded.tempered(padded)
    expected, own = forecast.tempered(forecast)
    assert temperature == pytest.approx(own)
    torch.testing.assert_close(mended.probabilities[:, :4], expected.probabilities)
    assert (mended.probabilities[:, 4:] == 0).all()


def test_optima_at_the_ends_stay_within_the_limits():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert 0.01 <= fitted(logits, [0, 1]) < 0.3  # always right
    assert 30 < fitted(logits, [1, 0]) <= 100  # always wrong


def test_validation_needs_labels():
    bare = forecast_of(torch.zeros(3, 2))
    with pytest.raises(DataError, match="labels are needed"):
        bare.tempered(bare)
    with pytest.raises(ConfigError, match="validation: expected a ClassForecast"):
        bare.tempered(bare.probabilities)


def with_novelty(p: list[float]) -> ClassForecast:
    forecast = ClassForecast.from_draws(torch.full((1, len(p), 2), 0.5))
    return replace(forecast, novelty=torch.tensor(p, dtype=torch.float64))


def test_texts_are_ranked_by_novelty_where_it_is_known() -> None:
    forecast = with_novelty([0.5, 0.01, 0.9])
    assert forecast.unlike(0.5).tolist() == [True, True, False]
    assert forecast.flag(0.7, by="novelty").tolist() == [1, 0, 2]
    assert forecast.to_dataset()["novelty"][:] == [0.5, 0.01, 0.9]
    assert "1 unlike what was learnt" in repr(forecast)
    assert forecast.tempered(forecast.with_labels([0, 1, 0]))[0].novelty is forecast.novelty
    assert forecast.joined([forecast, forecast]).novelty.shape == (6,)  # type: ignore[union-attr]
    bare = replace(forecast, novelty=None)
    assert "novelty" not in bare.summary() and "unlike" not in repr(bare)
    with pytest.raises(ConfigError, match="by='novelty'"):
        bare.uncertainty("novelty")
    with pytest.raises(DataError, match="does not know what it has learnt"):
        bare.unlike()


def test_the_reason_is_the_largest_part_unless_the_text_is_novel() -> None:
    parts = [[0.95, 0.05], [0.2, 0.8], [0.99, 0.01]]  # components: agree, disagree, ...
    other = [[0.95, 0.05], [0.8, 0.2], [0.01, 0.99]]
    one, two = (ClassForecast.from_draws(torch.tensor([rows])) for rows in (parts, other))
    mixed = ClassForecast.mixed([one, two])
    assert mixed.reasons() == [None, "people may differ", "models disagree"]
    draws = torch.tensor([[[0.99, 0.01]], [[0.01, 0.99]]])
    alone = ClassForecast.from_draws(draws)
    assert alone.reasons() == ["little learnt from such texts"]
    assert ClassForecast.mixed([alone, alone]).reasons() == ["little learnt from such texts"]
    novel = replace(mixed, novelty=torch.tensor([0.05, 0.06, 0.01], dtype=torch.float64))
    wanted = ["unlike what was learnt", "people may differ", "unlike what was learnt"]
    assert novel.reasons() == novel.summary()["reason"] == wanted


def test_of_ratings_noise_alone_is_no_reason() -> None:
    means, sds = torch.tensor([[0.0, 0.0], [0.1, 4.0]]), torch.full((2, 2), 1.0)
    forecast = RatingForecast.from_draws(means, sds, within=torch.zeros(2, 2))
    assert forecast.reasons() == [None, "models disagree"]


def test_under_a_promise_what_is_left_to_people_has_a_reason_and_nothing_else_has() -> None:
    forecast = ClassForecast.from_draws(torch.tensor([[[0.95, 0.05], [0.8, 0.2]]]))
    strict, lax = (
        replace(forecast, promised=promise_on("class", threshold=threshold, chance=torch.ones(1)))
        for threshold in (0.97, 0.7)
    )
    assert strict.reasons() == ["people may differ"] * 2 and lax.reasons() == [None, None]
    assert forecast.summary()["answered"] == [None, None]


def test_numpy_s_numbers_are_names_where_names_are_numbers() -> None:
    forecast = ClassForecast.from_draws(torch.full((1, 2, 3), 1 / 3), label_names=["1", "2", "3"])
    for given in ([1, 2], np.array([1, 2]), [np.int64(1), np.int64(2)]):
        labels = forecast.with_labels(given).labels
        assert labels is not None and labels.tolist() == [0, 1]


def test_truth_values_are_labels_only_where_they_are_names() -> None:
    """As in `Posterior.evaluate`."""
    p = torch.full((1, 2, 2), 0.5)
    truths = ClassForecast.from_draws(p, label_names=["False", "True"])
    for names, expected in ((["bad", "good"], r"some of \('bad', 'good'\)"), (None, "numbers of")):
        forecast = ClassForecast.from_draws(p, label_names=names)
        for given in ([True, False], np.array([True, False]), torch.tensor([True, False])):
            assert truths.with_labels(given).observed().tolist() == [1, 0]
            with pytest.raises(DataError, match=f"labels are truth values; expected {expected}"):
                forecast.with_labels(given)
