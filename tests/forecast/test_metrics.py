"""Metrics against other libraries and loops; scores beside the simplest forecast."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas
import pytest
import torch
from scipy import integrate, stats
from torchmetrics.functional.classification import multiclass_calibration_error

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import (
    aurc,
    calibration_bins,
    compared,
    evaluate,
    ood_auroc,
    rejection_curve,
    scored,
    standard_errors,
)


@pytest.fixture(scope="module")
def news() -> ClassForecast:
    """300 examples of 5 classes, of which class 4 never occurs, forecast none too well."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    logits = 1.5 * torch.nn.functional.one_hot(labels, 5) + torch.randn(300, 5, generator=generator)
    logits[:, 4] = -30.0
    draws = (1.7 * logits + torch.randn(8, 300, 5, generator=generator)).double().softmax(-1)
    return ClassForecast.from_draws(draws, labels=labels)


@pytest.fixture(scope="module")
def stars() -> RatingForecast:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    sd = 0.3 + torch.rand(5, 40, generator=generator, dtype=torch.float64)
    labels = mean.mean(0) + torch.randn(40, generator=generator, dtype=torch.float64)
    return RatingForecast.from_draws(mean, sd, labels=labels)


def bin_of(confidence: float, bins: int) -> int:
    return next(m for m in range(bins) if confidence <= (m + 1) / bins)


def loop_errors(confidence: list[float], correct: list[float], bins: int) -> tuple[float, float]:
    """Expected and maximum calibration error, bin by bin."""
    gaps = []
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if bin_of(c, bins) == m]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            gaps.append((len(inside) / len(confidence), abs(accuracy - mean)))
    return sum(share * gap for share, gap in gaps), max(gap for _, gap in gaps)


def test_calibration_errors_are_those_of_a_loop_and_of_torchmetrics(news):
    scores = evaluate(news)
    correct = (news.label == news.labels).double().tolist()
    expected, maximum = loop_errors(news.confidence.tolist(), correct, 15)
    assert scores["ece"] == pytest.approx(expected)
    assert scores["mce"] == pytest.approx(maximum)
    for name, norm in (("ece", "l1"), ("mce", "max")):
        peer = multiclass_calibration_error(news.probabilities, news.labels, 5, 15, norm)
        assert scores[name] == pytest.approx(peer.item(), abs=1e-6)
    classwise = [
        loop_errors(news.probabilities[:, k].tolist(), (news.labels == k).double().tolist(), 15)[0]
        for k in range(5)
    ]
    assert scores["classwise_ece"] == pytest.approx(sum(classwise) / 5)


def test_edges_belong_to_the_bin_below_and_certainty_to_the_last():
    bins = calibration_bins(torch.tensor([0.0, 0.25, 0.2500001, 1.0]).double(), torch.ones(4), 4)
    assert bins.count.tolist() == [2, 1, 0, 1]
    # torchmetrics gives confidence 1 a bin of its own: its ECE here is (1 * 0 + 1 * 0.95) / 2
    shared = calibration_bins(torch.tensor([1.0, 0.95]), torch.tensor([True, False]), 15)
    assert shared.expected_error == pytest.approx(0.975 - 0.5)


def test_aurc_is_that_of_a_loop(news):
    wrong = (news.label != news.labels).tolist()
    order = sorted(range(300), key=lambda n: -news.confidence[n].item())
    risks = [sum(wrong[n] for n in order[:k]) / k for k in range(1, 301)]
    assert evaluate(news)["aurc"] == pytest.approx(sum(risks) / 300)
    # The area under the curve of all fractions, as `rejection_curve` has it.
    fractions = [k / 300 for k in range(300)]
    curve = rejection_curve(news, by="confidence", fractions=fractions)[1]
    assert 1 - evaluate(news)["aurc"] == pytest.approx(curve.mean().item())


def test_numbers_of_any_library_and_no_others() -> None:
    loss, uncertainty = [0.0, 1.0, 1.0], [0.2, 0.9, 0.4]
    for kind in (torch.tensor, np.array, pandas.Series, list):
        assert aurc(kind(loss), kind(uncertainty)) == pytest.approx((0 + 1 / 2 + 2 / 3) / 3)
        assert calibration_bins(kind(uncertainty), kind(loss)).count.sum() == 3
    for wrong in ([math.nan, 0.1, 0.2], [math.inf, 0.1, 0.2], [0.1]):
        with pytest.raises(ValueError):
            aurc(loss, wrong)
    with pytest.raises(ValueError, match="minimum of 1"):
        aurc([], [])


def test_aurc_of_ties_is_the_average_over_their_orders():
    loss, uncertainty = [0.0, 1.0, 0.0, 1.0, 1.0], torch.tensor([0.1, 0.3, 0.3, 0.3, 0.7])
    areas = []
    for middle in itertools.permutations(loss[1:4]):
        ordered = [loss[0], *middle, loss[4]]
        areas.append(sum(sum(ordered[:k]) / k for k in range(1, 6)) / 5)
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    area = aurc(torch.tensor(loss)[shuffled], uncertainty[shuffled])
    assert area == pytest.approx(sum(areas) / len(areas))


@pytest.mark.parametrize("by", ["epistemic", "total"])
@pytest.mark.parametrize("kind", ["news", "stars"])
def test_rejection_curves_are_those_of_loops(kind, by, request):
    forecast = request.getfixturevalue(kind)
    fractions, kept = rejection_curve(forecast, by=by)
    assert fractions.tolist() == pytest.approx([tenth / 10 for tenth in range(10)])
    quality = forecast.loss(forecast.labels)
    quality = 1 - quality if forecast.higher_is_better else quality
    order, count = forecast.uncertainty(by).argsort(), len(forecast)
    for tenth in range(10):
        expected = quality[order[: count - count * tenth // 10]].mean().item()
        assert kept[tenth].item() == pytest.approx(expected)
    whole = rejection_curve(forecast, by=by, fractions=[k / count for k in range(count)])[1]
    area = aurc(forecast.loss(forecast.labels), forecast.uncertainty(by))
    assert whole.mean().item() == pytest.approx(1 - area if forecast.higher_is_better else area)


def test_rejection_keeps_one_and_loses_none_to_a_rounding_error():
    assert 0.29 * 100 < 29
    confidence = torch.linspace(0.51, 0.99, 100)
    draws = torch.stack([confidence, 1 - confidence], -1)[None]
    labels = [1] * 29 + [0] * 71  # just the 29 least certain are wrong
    forecast = ClassForecast.from_draws(draws, labels=labels)
    assert rejection_curve(forecast, by="total", fractions=[0.29])[1].tolist() == [1.0]
    one = ClassForecast.from_draws(torch.full((1, 1, 2), 0.5), labels=[0])
    assert rejection_curve(one)[1].tolist() == [1.0] * 10
    with pytest.raises(ConfigError, match="fractions"):
        rejection_curve(forecast, fractions=[0.5, 1.0])


def test_strange_examples_are_less_certain(news):
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(8, 90, 5, generator=generator, dtype=torch.float64).softmax(-1)
    outside = ClassForecast.from_draws(draws)
    for by in ("epistemic", "confidence"):
        inside, strange = news.uncertainty(by), outside.uncertainty(by)
        share = (strange > inside.unsqueeze(1)).double().mean().item()
        assert ood_auroc(news, outside, by=by) == pytest.approx(share)
    assert ood_auroc(news, news) == pytest.approx(0.5)


def test_numbers_of_python_keep_their_digits():
    """In single precision both would be 1.7e9."""
    forecast = RatingForecast.from_draws(torch.tensor([[1.7e9]]).double(), torch.ones(1, 1))
    assert evaluate(forecast, [1.7e9 + 42])["mse"] == 42**2


def test_a_rating_at_the_end_of_the_scale_is_within():
    """Where the end has no exact float32, and the label is a float64."""
    sds = torch.full((1, 2), 0.2)
    forecast = RatingForecast.from_draws(torch.tensor([[0.7, 0.1]]), sds, scale=(0.1, 0.7))
    assert forecast.coverage([0.7, 0.1])[0] == 1.0


def test_coverage_and_width_are_those_of_the_mixtures_quantiles(stars):
    inside, width = stars.coverage(level=0.5)
    truth, means, sds = stars.labels.numpy(), stars.means.numpy(), stars.sds.numpy()
    below = stats.norm.cdf(truth, means, sds).mean(0)
    assert inside == pytest.approx(((below >= 0.25) & (below <= 0.75)).mean())
    lower, upper = stars.interval(0.5)
    assert width == pytest.approx((upper - lower).mean().item())


def test_crps_is_the_integral_that_defines_it(stars):
    scores = stars.crps()
    for n in range(4):
        components = stats.norm(stars.means[:, n].numpy(), stars.sds[:, n].numpy())
        y = stars.labels[n].item()
        left, _ = integrate.quad(lambda x, f=components: f.cdf(x).mean() ** 2, -15, y)
        right, _ = integrate.quad(lambda x, f=components: (1 - f.cdf(x).mean()) ** 2, y, 15)
        assert scores[n].item() == pytest.approx(left + right, abs=1e-7)


def test_a_probability_that_rounds_to_zero_is_small_and_no_more() -> None:
    forecast = ClassForecast.from_draws(torch.tensor([[[1.0, 0.0], [0.6, 0.4]]]), labels=[1, 0])
    tiny = torch.finfo(torch.float32).tiny
    expected = -(math.log(tiny) + math.log(0.6)) / 2
    assert evaluate(forecast)["nll"] == pytest.approx(expected, rel=1e-6)
    assert forecast.nlls().isfinite().all()


def test_f1_is_zero_where_no_label_occurs() -> None:
    labels = LabelsForecast.from_draws(torch.full((2, 4, 3), 0.1), labels=torch.zeros(4, 3))
    scores = evaluate(labels)
    assert scores["f1"] == scores["f1_micro"] == 0.0


# Scores and differences


def classes(right: list[bool], **how: object) -> ClassForecast:
    """Of two classes, of which all examples have the first."""
    sure = torch.tensor([[0.9, 0.1] if each else [0.2, 0.8] for each in right])
    return ClassForecast.from_draws(sure[None], labels=torch.zeros(len(right)), **how)


def test_classes_are_beside_the_most_frequent_one():
    forecast = classes([True] * 30 + [False] * 10)
    error = np.std([1] * 30 + [0] * 10, ddof=1) / 40**0.5
    assert scored(forecast, torch.tensor([1, 1, 0])) == (
        f"accuracy 0.750 ± {error:.3f} on 40 held-out rows (always the most frequent class: 0.000)"
    )
    # With as many of each there is no reason to take the one that is rare here.
    for known in ([0, 1], [1, 0, 0]):
        said = scored(forecast, torch.tensor(known))
        assert "class: 1.000); not clearly better than that (by -0.250 ± " in said


def test_other_kinds_are_beside_their_simplest_forecast():
    there = torch.tensor([[True, True, True, False], [True, True, False, False]])
    values = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.4, 0.6, 0.0, 0.0]]])
    choices = ClassForecast.from_draws(values, labels=torch.tensor([0, 1]), choices=there)
    said = scored(choices, torch.zeros(2))
    assert said.startswith("accuracy 1.000 ± ") and f": {(1 / 3 + 1 / 2) / 2:.3f})" in said
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    several = LabelsForecast.from_draws(torch.tensor([[[0.9, 0.1], [0.9, 0.2]]]), labels=truth)
    said = scored(several, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert said.startswith("share of right labels 0.750 ± ") and ": 0.750)" in said
    labels = torch.tensor([1.0, 3.0, 5.0])
    ratings = RatingForecast.from_draws(labels[None] + 1, torch.ones(1, 3), labels=labels)
    said = scored(ratings, torch.tensor([1.0, 2.0]))
    assert said.startswith("mean squared error 1.000 ± 0.000 on 3 held-out rows")
    assert f": {((labels - 1.5) ** 2).mean():.3f})" in said


def test_differences_are_of_the_same_rows():
    """Two forecasts with the same accuracy on other rows differ by chance; one that is right
    wherever the other is and on more rows is better."""
    before = classes([True, False] * 15)
    swapped, better = (
        classes([False, True] * 15),
        classes([True, True, True, False] * 7 + [True] * 2),
    )
    assert compared(swapped, before).count("(no significant difference)") == 2
    said = compared(better, before)
    gain = torch.tensor([0.0, 1.0, 0.0, 0.0] * 7 + [0.0, 1.0])
    error = gain.std().item() / 30**0.5
    assert said.startswith(f"accuracy +{gain.mean():.3f} ± {error:.3f} (better), NLL -")
    assert compared(before, better).startswith(f"accuracy -{gain.mean():.3f} ± {error:.3f} (worse)")


def test_standard_errors_are_those_of_means_over_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.softmax(torch.randn(1, 200, 3, generator=generator), -1)
    labels = torch.randint(0, 3, (200,), generator=generator)
    forecast = ClassForecast.from_draws(draws, labels=labels)
    found, right = standard_errors(forecast), evaluate(forecast)["accuracy"]
    assert found["accuracy_se"] == pytest.approx((right * (1 - right) / 199) ** 0.5)
    assert found["nll_se"] == pytest.approx(float(forecast.nlls().std() / 200**0.5))
    ratings = RatingForecast.from_draws(draws[..., 0], draws[..., 1], labels=labels.double())
    squares = (ratings.mean.double() - labels).square()
    found = standard_errors(ratings)
    assert found["mse_se"] == pytest.approx(float(squares.std() / 200**0.5))
    alone = ClassForecast.from_draws(draws[:, :1], labels=labels[:1])
    assert standard_errors(alone) == {}
