"""Sets and intervals: coverage by brute force, overall and by class, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from students import fitted, fresh, promise_on

from bhpeft_pyro.decisions.promises import Promise
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import ClassForecast, RatingForecast

LEVEL = 0.8


def classes(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that are wrong for the second of three classes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.1, 0.3]), rows, True, generator=generator)
    logits = torch.randn(rows, 3, generator=generator)
    logits[torch.arange(rows), labels] += torch.tensor([2.0, 0.2, 1.0])[labels]
    return logits.softmax(1), labels


def promise_for(p: torch.Tensor, labels: torch.Tensor) -> Promise:
    chosen = p.double().gather(1, labels[:, None])[:, 0]
    return promise_on("class", miss=1 - chosen, label=labels)


def test_each_class_is_covered() -> None:
    """Over many calibration sets, within binomial error; all together the second is not."""
    covered, counts, sizes = torch.zeros(3), torch.zeros(3), []
    for seed in range(40):
        made = promise_for(*classes(300, 2 * seed))
        new, truth = classes(300, 2 * seed + 1)
        forecast = ClassForecast.from_draws(new[None])
        sets = [{*one} for one in replace(forecast, promised=made).sets(LEVEL)]
        for label, one in zip(truth.tolist(), sets, strict=True):
            covered[label] += str(label) in one
            counts[label] += 1
        sizes.append(np.mean([len(one) for one in sets]))
    share = covered / counts
    # Calibration rows are shared by the texts of a set: the sd of a class's coverage adds to it.
    assert (share > LEVEL - 0.03).all() and (share < LEVEL + 0.05).all(), share
    assert 1 < np.mean(sizes) < 2.5


def test_sets_are_those_of_the_definition() -> None:
    p, labels = classes(200, 0)
    chosen = p.double().gather(1, labels[:, None])[:, 0]
    new, _ = classes(50, 1)
    forecast = ClassForecast.from_draws(new[None], label_names=["a", "b", "c"])
    forecast = replace(forecast, promised=promise_for(p, labels))
    expected = []
    for row in new.double():
        names = []
        for k, name in enumerate("abc"):
            own = chosen[labels == k]
            if (1 + (own <= row[k]).sum()) / (1 + len(own)) > 1 - LEVEL + 1e-9:
                names.append(name)
        expected.append(names)
    assert forecast.sets(LEVEL, empty=True) == expected
    filled = forecast.sets(LEVEL)
    for row, one, other in zip(new, expected, filled, strict=True):
        assert other == (one or ["abc"[int(row.argmax())]])
    low = forecast.sets(0.3, empty=True)
    assert [] in low and [] not in forecast.sets(0.3)


def test_a_class_without_calibration_rows_is_in_every_set_and_said() -> None:
    p, labels = classes(200, 0)
    kept = labels != 1
    forecast = ClassForecast.from_draws(p[None], label_names=["a", "b", "c"])
    forecast = replace(forecast, promised=promise_for(p[kept], labels[kept]))
    with pytest.warns(
        UserWarning, match=r"level=0.8: 'b' \(0\) have fewer than 4 calibration rows"
    ):
        sets = forecast.sets(LEVEL)
    assert all("b" in one for one in sets)


@pytest.mark.parametrize(("rows", "warns"), [(8, True), (9, False), (10, False)])
def test_nine_rows_of_a_class_can_leave_it_out(rows: int, warns: bool) -> None:
    labels = torch.tensor([0] * 50 + [1] * rows)
    made = promise_on("class", miss=torch.linspace(0.1, 0.4, len(labels)), label=labels)
    sure = torch.tensor([[[0.99, 0.01]]]).double()
    forecast = replace(ClassForecast.from_draws(sure, label_names=["a", "b"]), promised=made)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert forecast.sets(0.9) == [["a", "b"] if warns else ["a"]]
    assert bool(given) == warns


def test_choices_that_do_not_exist_are_in_no_set() -> None:
    choices = torch.tensor([[True, True, False], [True, True, True]])
    p = torch.tensor([[[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]]])
    forecast = ClassForecast.from_draws(p, choices=choices)
    miss = torch.ones(30).double()  # so that all are in it
    made = promise_on("choice", miss=miss, label=torch.zeros(30, dtype=torch.long))
    assert replace(forecast, promised=made).sets() == [[0, 1], [0, 1, 2]]


def test_intervals_cover_and_are_wide_where_the_forecast_is_uncertain() -> None:
    inside = total = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        sds = torch.rand(400, generator=generator) + 0.1
        labels = 2 * sds * torch.randn(400, generator=generator)  # of twice the sd that is said
        made = promise_on("rating", residual=labels[:200].double(), sd=sds[:200].double())
        forecast = RatingForecast.from_draws(torch.zeros(1, 200), sds[None, 200:])
        lower, upper = replace(forecast, promised=made).intervals(LEVEL)
        inside += int(((lower <= labels[200:]) & (labels[200:] <= upper)).sum())
        total += 200
        torch.testing.assert_close(
            (upper - lower) / sds[200:], ((upper - lower) / sds[200:])[:1].expand(200)
        )
    assert abs(inside / total - LEVEL) < 0.02


@pytest.mark.parametrize("rows", [9, 10, 49])
def test_an_interval_is_that_of_the_definition(rows: int) -> None:
    """The smallest multiple of the sd that ceil(level (n + 1)) residuals do not exceed."""
    residual = torch.randn(rows, dtype=torch.double)
    made = promise_on("rating", residual=residual, sd=torch.full((rows,), 0.5).double())
    forecast = RatingForecast.from_draws(torch.zeros(1, 1), torch.ones(1, 1), scale=(None, 1.0))
    lower, upper = replace(forecast, promised=made).intervals(0.9)
    rank = round(0.9 * (rows + 1)) if rows != 10 else 10
    width = (residual.abs() / 0.5).sort().values[rank - 1]
    assert lower.item() == pytest.approx(-width.item()) and upper.item() <= 1.0


@pytest.mark.parametrize("kind", ["class", "choice", "rating"])
def test_a_posterior_has_them_after_a_promise(kind: str) -> None:
    new = fresh(kind, 200, 9)
    how = {"tolerance": 0.4} if kind == "rating" else {}
    posterior = fitted(kind).promise(new, max_share_to_people=0.5, **how)
    forecast: Any = posterior.predict(new)
    if kind == "rating":
        lower, upper = forecast.intervals()
        inside = ((lower <= forecast.labels) & (forecast.labels <= upper)).double().mean().item()
    else:
        with warnings.catch_warnings(action="ignore"):
            sets = forecast.sets()
        names = forecast.label_names or range(forecast.probabilities.shape[1])
        inside = np.mean(
            [names[k] in one for k, one in zip(forecast.labels.tolist(), sets, strict=True)]
        )
    assert inside >= 0.9  # of the calibration rows themselves
    other = "sets" if kind == "rating" else "intervals"
    with pytest.raises(ConfigError, match=f"{other}: got a forecast of kind {kind!r}; expected"):
        getattr(forecast, other)()


def test_what_cannot_work_is_refused() -> None:
    forecast: Any = RatingForecast.from_draws(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(ConfigError, match="intervals: the forecast has no calibration rows"):
        forecast.intervals()
    made = promise_on("rating", residual=torch.ones(8), sd=torch.ones(8))
    with pytest.raises(DataError, match=r"level=0\.9: 8 calibration rows; expected at least 9"):
        replace(forecast, promised=made).intervals()
    with pytest.raises(ConfigError, match="level=1"):
        replace(forecast, promised=made).intervals(1)
