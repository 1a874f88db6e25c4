"""A promised error: rounds, students, files, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from saves import load, rewrite
from students import fitted, fresh, table, unlabelled, with_student

import bhpeft_pyro as bh
from bhpeft_pyro.decisions.promises import Promise
from bhpeft_pyro.errors import ConfigError, DataError, SaveError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.testing import tiny_model

# When an answer is right


def test_the_chance_that_an_answer_is_right_is_that_of_draws() -> None:
    torch.manual_seed(0)
    means, sds = torch.randn(3, 4), torch.rand(3, 4) + 0.2
    ratings = RatingForecast.from_draws(means, sds, within=torch.rand(3, 4), labels=[0.0, 1, 2, 3])
    part = torch.randint(3, (200_000,))
    drawn = means[part] + ratings.component_sds[part] * torch.randn(200_000, 4)
    near = ((drawn - ratings.mean).abs() <= 0.7).double().mean(0)
    torch.testing.assert_close(ratings.chance_right(0.7), near, atol=5e-3, rtol=0)
    assert ratings.wrong(0.7).tolist() == ((ratings.mean - ratings.labels).abs() > 0.7).tolist()
    outcomes = RatingForecast.from_draws(means, sds, outcomes=drawn[:999].T.expand(3, 4, 999))
    near = ((drawn[:999] - outcomes.mean).abs() <= 0.7).double().mean(0)
    torch.testing.assert_close(outcomes.chance_right(0.7), near)

    for given in ({}, {"outcomes": drawn[:999].T.expand(3, 4, 999)}):
        limited = RatingForecast.from_draws(means, sds, scale=(-0.5, 0.6), **given)
        all_drawn = means[part] + limited.component_sds[part] * torch.randn(200_000, 4)
        values = (drawn[:999] if given else all_drawn).clamp(-0.5, 0.6)
        near = ((values - limited.mean).abs() <= 0.4).double().mean(0)
        torch.testing.assert_close(limited.chance_right(0.4), near, atol=5e-3, rtol=0)

    p = torch.tensor([[[0.9, 0.2, 0.5]]])
    labels = LabelsForecast.from_draws(p, labels=[[1, 0, 1]])
    assert labels.chance_right().item() == pytest.approx(0.9 * 0.8 * 0.5)
    assert labels.wrong().tolist() == [True]
    classes = ClassForecast.from_draws(torch.tensor([[[0.3, 0.7]] * 2]), labels=[1, 0])
    assert classes.chance_right().tolist() == pytest.approx([0.7, 0.7])
    assert classes.wrong().tolist() == [False, True]


# A posterior's


def promised(kind: str, posterior: Any = None, **how: Any) -> Any:
    """A posterior that leaves at most half of the texts to people."""
    how = {"max_share_to_people": 0.5, "tolerance": 0.4 if kind == "rating" else None} | how
    return (posterior or fitted(kind)).promise(fresh(kind, 200, 9), **how)


@pytest.mark.parametrize("kind", ["class", "stars", "labels", "rating", "choice"])
def test_predict_answers_the_texts_above_the_threshold(kind: str) -> None:
    posterior = promised(kind)
    made = posterior.promised
    forecast = posterior.predict(table(kind, 40, seed=10))
    sure = forecast.chance_right(made.tolerance) > made.threshold
    assert forecast.answered.tolist() == (sure & ~forecast.unlike()).tolist()
    assert 0 < forecast.answered.sum() < 40
    assert [*forecast.table()["answered"]] == forecast.answered.tolist()
    words = str(made)
    assert words.startswith(
        f"promise: of the texts that are answered, at most {100 * made.error:.3g}%"
    )
    assert "at most 50% of all texts are left to people" in words
    assert f"texts like the {made.rows} calibration rows" in words
    assert f"({made.answered}, {made.wrong} of them wrong)" in words and "confidence 90%" in words
    assert made.answered == posterior.predict(fresh(kind, 200, 9)).answered.sum()


def easy(seed: int) -> dict[str, list[Any]]:
    """200 texts whose first word says the label; of two seeds none is the same."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200).tolist()
    words = 2 * rng.choice(800, 200, replace=False) + seed % 2
    texts = [f"w{5 + k} w{8 + n // 40} w{8 + n % 40}" for k, n in zip(labels, words, strict=True)]
    return {"text": texts, "label": labels}


@cache
def sure() -> Any:
    quick = {"max_steps": 60, "batch_size": 16, "lr": 0.03, "progress": False}
    return bh.fit(tiny_model(()), "normal", easy(0), **quick)


def with_unlike(count: int) -> dict[str, list[Any]]:
    """Calibration rows, `count` of them unlike all that was learnt, each with a wrong label."""
    rows = easy(1)
    odd = [f"w2 w2 w2 w2 w2 w{2 + i // 47} w{2 + i % 47}" for i in range(count)]
    rows["text"][:count] = odd
    rows["label"][:count] = (1 - sure().predict(odd).label).tolist()
    return rows


def test_texts_unlike_what_was_learnt_are_for_people() -> None:
    rows = with_unlike(11)
    made = sure().promise(rows, error=0.2)
    unlike = made.predict(rows["text"]).unlike()
    assert unlike[:11].all() and made.promised.unlike == unlike.sum()
    forecast = made.predict(rows["text"])
    assert not (forecast.answered & unlike).any()
    assert made.promised.answered == forecast.answered.sum()
    assert f"{unlike.sum()} (" in str(made.promised) and "too unsure" in str(made.promised)
    # Answered too, they count too.
    how = {"max_share_to_people": 0.1, "answer_unlike": True}
    asked = sure().promise(rows, **how).promised
    assert asked.unlike == 0 and asked.answers(forecast)[:11].any()
    assert asked.wrong > made.promised.wrong and "not unlike" not in str(asked)


def test_the_promise_is_set_on_the_rows_that_may_be_answered() -> None:
    """With the texts that are unlike left out beforehand, by hand, it is the same promise."""
    rows = with_unlike(11)
    like = (~sure().predict(rows["text"]).unlike()).nonzero().flatten().tolist()
    alone = {name: [cells[i] for i in like] for name, cells in rows.items()}
    made, by_hand = (sure().promise(given, error=0.2).promised for given in (rows, alone))
    assert (made.threshold, made.answered, made.wrong) == (
        by_hand.threshold,
        by_hand.answered,
        by_hand.wrong,
    )
    assert made.share < by_hand.share  # of all rows, the unlike ones too


def test_too_many_unlike_texts_are_named() -> None:
    with pytest.raises(DataError, match=r"calibration rows are unlike .* where at most"):
        sure().promise(with_unlike(60), max_share_to_people=0.2)
    few = {name: cells[:60] for name, cells in with_unlike(40).items()}
    with pytest.raises(DataError, match="rows that are like the learnt ones; expected at least 45"):
        sure().promise(few)


def test_a_posterior_that_does_not_know_what_it_has_learnt() -> None:
    unknown = fitted("class").replace(novelty=None)
    with pytest.raises(DataError, match="expected answer_unlike=True"):
        unknown.promise(fresh("class", 100, 9), error=0.5)
    posterior = unknown.promise(fresh("class", 100, 9), error=0.5, answer_unlike=True)
    assert posterior.predict(["w5 w9"]).answered is not None
    # A promise that needs to know is not made of forecasts that do not say it.
    assert promised("class").replace(novelty=None).predict(["w5 w9"]).answered is None


def test_it_is_for_one_way_to_predict() -> None:
    texts = table("class", 20, seed=10)
    posterior = promised("class")
    assert posterior.promised.method == "exact"
    assert posterior.predict(texts, method="exact").answered is not None
    for other in ({"samples": 50}, {"seed": 1}, {"bf16": True}):
        assert posterior.predict(texts, **other).answered is None


def test_a_student_has_its_own() -> None:
    student = promised("class", with_student())
    assert student.promised.method == "student"
    assert student.predict(["w5 w9"]).answered is not None
    assert student.predict(["w5 w9"], method="exact").answered is None
    learnt, new = table("class", 220, seed=3), fresh("class", 40, 9)
    both = {name: learnt[name] + new[name] for name in new}
    for method in (None, "exact"):
        with pytest.warns(UserWarning, match="rows have the text of a row that was learnt"):
            half = with_student().promise(both, max_share_to_people=0.5, method=method)
        assert half.promised.rows == len(new["text"])
    assert half.distill(unlabelled("class"), epochs=1, progress=False).promised is None


def test_rows_that_were_learnt_or_held_out_are_left_out() -> None:
    posterior, known, new = fitted("class"), table("class"), fresh("class", 100, 9)
    with pytest.raises(
        DataError, match="calibration: 60 of 60 rows have the text of a row that was"
    ):
        posterior.promise(known)
    both = {name: known[name] + new[name] for name in new}
    with pytest.warns(UserWarning, match=r"calibration: 6\d of 1.. rows have .* they are left out"):
        made = posterior.promise(both, error=0.3).promised
    assert 90 <= made.rows <= 100
    alone = posterior.promise(new, error=0.3).promised
    torch.testing.assert_close(made.calibration["miss"], alone.calibration["miss"])


def test_rows_that_come_often_are_named() -> None:
    rows = fresh("class", 60, 9)
    often = {name: values[:20] * 3 for name, values in rows.items()}
    with pytest.warns(UserWarning, match="calibration: 40 of 60 rows repeat another's text"):
        fitted("class").promise(often, max_share_to_people=0.5)


def test_it_ends_with_the_round() -> None:
    posterior = promised("class")
    later = posterior.update(table("class", 20, seed=12), max_steps=1, progress=False)
    assert later.promised is None and later.predict(["w5"]).answered is None
    with pytest.raises(ConfigError, match=r"promised: it is of round .*posterior.promise"):
        later.replace(promised=posterior.promised).predict(["w5"])
    assert posterior.grow(["3"]).promised is None
    with pytest.warns(UserWarning, match="is not known"):
        posterior.replace(learnt_rows=None).promise(fresh("class", 60, 9), error=0.3)
    # What the earlier round has learnt counts too.
    with pytest.raises(DataError, match="60 of 60 rows"):
        later.promise(table("class"))


@pytest.mark.parametrize("kind", ["class", "rating"])
def test_it_is_saved_with_the_round(kind: str, tmp_path: Any) -> None:
    posterior = promised(kind)
    again = load(posterior.save(tmp_path / "run"))
    assert str(again.promised) == str(posterior.promised)
    assert repr(again.promised) == f"Promise({again.promised.in_short})"
    for name, values in posterior.promised.calibration.items():
        assert torch.equal(again.promised.calibration[name], values)
    texts = table(kind, 20, seed=10)
    assert torch.equal(again.predict(texts).answered, posterior.predict(texts).answered)
    for name, value in (("rows", 3), ("threshold", "high"), ("kind", "labels"), ("more", 1)):
        broken = tmp_path / name
        posterior.save(broken)
        rewrite(broken, lambda plain, n=name, v=value: plain["promised"].update({n: v}))
        with pytest.raises(SaveError):
            load(broken)


def test_numpy_s_numbers_are_saved_too(tmp_path: Any) -> None:
    how = {"tolerance": np.float32(1.5), "max_share_to_people": np.float32(0.25)}
    posterior = fitted("rating").promise(fresh("rating", 100, 9), **how)
    again = load(posterior.save(tmp_path / "run")).promised
    assert again.tolerance == 1.5 and again.to_people == 0.25


def test_what_cannot_be_promised_is_refused() -> None:
    new = fresh("class", 44, 9)
    for how, message in (
        ({}, "calibration: 4. rows; expected at least 45"),
        ({"error": 0.01}, "expected at least 230"),
        ({"error": 0.0}, "error=0.0"),
        ({"confidence": 1}, "confidence=1"),
        ({"tolerance": 0.5}, "tolerance=0.5: for kind 'class' expected None"),
        ({"error": 0.1, "max_share_to_people": 0.2}, "expected one of them"),
        ({"method": "student", "error": 0.3}, "no student"),
        ({"max_share_to_people": 1.0}, "max_share_to_people=1.0"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            fitted("class").promise(new, **how)
    with pytest.raises(ConfigError, match="tolerance=None: for kind 'rating' expected a distance"):
        fitted("rating").promise(fresh("rating", 60, 9))


def test_a_forecast_that_is_changed_answers_nothing() -> None:
    forecast = promised("labels").predict(table("labels", 9, seed=10))
    assert forecast.with_threshold(0.3).answered is None
    classes: Any = promised("class").predict(table("class", 9, seed=10))
    assert ClassForecast.mixed([classes, classes]).answered is None
    assert classes.tempered(classes)[0].answered is None
    none = replace(classes.promised, threshold=None)
    assert isinstance(none, Promise) and not none.answers(classes).any()
    assert "answered: none" in str(none)
