"""Watching a promise: false alarms, how soon shifts are noticed, and rounds of a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from students import QUICK, fitted, promise_on, table

import bhpeft_pyro as bh
from bhpeft_pyro.decisions.promises import Promise
from bhpeft_pyro.decisions.watching import (
    Watch,
    error_evidence,
    in_words,
    largest_evidence,
    watched,
)
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.streams import Record
from bhpeft_pyro.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.* with different labels")  # which are random

ERROR = 0.05


def test_the_evidence_is_the_integral() -> None:
    for answered, wrong in ((0, 0), (10, 3), (200, 4), (200, 30)):
        right = answered - wrong

        def ratio(p: float, w: int = wrong, r: int = right) -> float:
            return float((p / ERROR) ** w * ((1 - p) / (1 - ERROR)) ** r)

        expected, _ = quad(ratio, ERROR, 1, points=[0.1, 0.3])
        assert error_evidence(answered, wrong, ERROR) == pytest.approx(
            expected / (1 - ERROR), rel=1e-6
        )


def test_labels_one_by_one_are_judged_together() -> None:
    wrong = (np.random.default_rng(1).random(60) < 0.2).tolist()
    counts = [(n, sum(wrong[:n])) for n in range(61)]
    expected = max(error_evidence(n, x, ERROR) for n, x in counts)
    assert largest_evidence(wrong, ERROR) == pytest.approx(expected, rel=1e-12)
    rest = max(error_evidence(n, x, ERROR) for n, x in counts[21:])
    given = largest_evidence(wrong[20:], ERROR, *counts[20])
    assert given == pytest.approx(max(rest, 1.0), rel=1e-12)
    assert largest_evidence([], ERROR) == largest_evidence([True], 1.0) == 1.0


def first_alarm(true: float, rng: np.random.Generator, rows: int, every: int) -> float:
    wrong = (rng.random(rows) < true).cumsum()
    for n in range(every, rows + 1, every):
        if error_evidence(n, int(wrong[n - 1]), ERROR) >= 20:
            return n
    return np.inf


def test_errors_are_noticed_and_false_alarms_are_few() -> None:
    rng = np.random.default_rng(0)
    false = [first_alarm(ERROR, rng, 2000, 20) for _ in range(100)]
    assert np.isfinite(false).sum() <= 10  # 5 are allowed, with binomial error
    found = [first_alarm(0.15, rng, 1000, 10) for _ in range(50)]
    assert np.median(found) <= 80 and max(found) < np.inf


def test_a_watch_takes_as_many_labels_as_its_page_says() -> None:
    """Medians, from the exact probabilities of the counts before an alarm."""
    for true, said in ((0.25, 15), (0.15, 50), (0.1, 220)):
        left, bound, n = np.eye(1, 400)[0], 1, 0  # left[x]: x are wrong, and no alarm
        while left.sum() > 0.5:
            left, n = (1 - true) * left + true * np.roll(left, 1), n + 1
            while error_evidence(n, bound, ERROR) < 20:
                bound += 1
            left[bound:] = 0
        assert n == pytest.approx(said, rel=0.15)


def test_it_is_sooner_than_that_of_mapie() -> None:
    testing = pytest.importorskip("mapie.exchangeability_testing")
    risk = pytest.importorskip("mapie.risk_control").BinaryRisk(
        risk_occurrence=lambda y, p: y != p,
        risk_condition=lambda y, p: np.ones(len(y), dtype=bool),
        higher_is_better=False,
    )
    wrong = np.random.default_rng(1).random(600) < 0.15
    other = testing.RiskMonitoring(risk, test_level=0.1, threshold=ERROR, warn=False)
    other.update(np.zeros(600), wrong.astype(float))
    (at,) = np.nonzero(other.online_risk_lower_bound_sequence_history > ERROR)
    ours = next(n for n in range(1, 601) if error_evidence(n, int(wrong[:n].sum()), ERROR) >= 20)
    assert ours < at[0] + 1


def forecast_of(logit: np.ndarray, made: Promise, wrong: np.ndarray | None = None) -> Any:
    p = torch.from_numpy(1 / (1 + np.exp(-logit)))
    labels = None if wrong is None else wrong.astype(int)
    forecast = ClassForecast.from_draws(torch.stack([p, 1 - p], -1)[None], labels=labels)
    return replace(forecast, promised=made)


def promised(logit: np.ndarray) -> Promise:
    chance = torch.from_numpy(1 / (1 + np.exp(-logit)))
    return promise_on("class", error=ERROR, threshold=0.8, chance=chance)


def test_labels_count_answered_texts_alone() -> None:
    rng = np.random.default_rng(3)
    logit = np.abs(rng.normal(2, 2, 400))
    made = promised(logit)
    unsure = logit < np.log(4)
    watch = Watch(made).see(forecast_of(logit, made, unsure))  # all wrong answers are withheld
    assert (watch.answered, watch.wrong) == (int((~unsure).sum()), 0) and watch.holds
    watch = Watch(made).see(forecast_of(logit, made, ~unsure))
    assert watch.wrong == watch.answered and not watch.holds
    said = str(watch)
    assert "no longer holds" in said and "100%" in said


def test_what_it_cannot_watch_is_refused() -> None:
    made = promised(np.ones(50))
    with pytest.raises(ConfigError, match="level=2"):
        Watch(made, level=2)
    for other in (None, replace(made, round="b")):
        with pytest.raises(ConfigError, match="not under the promise that is watched"):
            Watch(made).see(forecast_of(np.ones(3), other))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels"):
        Watch(made).see(forecast_of(np.ones(3), made))


# Streams


def rows_of(seed: int, count: int = 40, wrong: bool = False) -> dict[str, list[Any]]:
    """Texts whose first word says the label, or nothing about it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    words = rng.integers(8, 28, (count, 2)) + 20 * (seed == 9)  # calibration rows are no copies
    first = rng.integers(0, 2, count) if wrong else labels
    texts = [f"w{5 + k} w{a} w{b}" for k, (a, b) in zip(first, words, strict=True)]
    return {"text": texts, "label": labels.tolist()}


def test_a_stream_promises_after_every_round_and_says_when_it_is_broken(tmp_path: Path) -> None:
    batches = {"one": rows_of(0, 80), "two": rows_of(1), "three": rows_of(2, 60, wrong=True)}
    how: dict[str, Any] = {
        "promise": {"calibration": rows_of(9, 120), "error": 0.2, "answer_unlike": True}
    }
    how |= QUICK | {"components": 1, "guide": "normal", "max_steps": 60}
    last = bh.stream(tiny_model(()), batches, tmp_path, **how)
    one, two, three = Record.of(last).rows
    assert last.promised is not None and last.promised.round == last.report.id
    assert "promise/broken" not in one
    assert two["promise/error"] == 0.2 and two["promise/broken"] == 0
    assert two["promise/answered"] == 40 >= 10 * two["promise/wrong"]
    assert three["promise/broken"] == 1 and three["promise/wrong"] > 20
    answered, wrong = (int(two[k] + three[k]) for k in ("promise/answered", "promise/wrong"))
    assert three["promise/evidence"] == pytest.approx(error_evidence(answered, wrong, 0.2))
    assert (in_words(three) or "").startswith("no longer holds, ")
    more = batches | {"four": rows_of(3)}
    *_, four = Record.of(bh.stream(tiny_model(()), more, tmp_path, **how)).rows
    # It counts anew after an alarm.
    again = error_evidence(int(four["promise/answered"]), int(four["promise/wrong"]), 0.2)
    assert four["promise/evidence"] == pytest.approx(again)


def test_a_promise_that_cannot_be_made_is_refused_before_the_first_round(tmp_path: Path) -> None:
    for promise, kind, message in (
        ({"error": 0.1}, ConfigError, "expected 'calibration'"),
        ({"calibration": rows_of(9, 20)}, DataError, "promise: calibration: 20 rows; expected"),
        ({"calibration": {"text": ["w5"] * 50}}, DataError, "promise: .*label"),
        ({"calibration": rows_of(9), "error": 2}, ConfigError, "error=2"),
    ):
        with pytest.raises(kind, match=message):
            bh.stream(tiny_model(()), {"one": rows_of(0)}, tmp_path, promise=promise, **QUICK)  # type: ignore[arg-type]
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.filterwarnings("ignore:.*repeat another's text")
def test_calibration_rows_may_be_read_but_once(tmp_path: Path) -> None:
    rows = rows_of(9, 120)
    once = ({"text": text, "label": label} for text, label in zip(*rows.values(), strict=True))
    promise = {"calibration": once, "error": 0.4}
    last = bh.stream(tiny_model(()), {"one": rows_of(0)}, tmp_path, promise=promise, **QUICK)
    assert last.promised is not None


def test_nothing_exceeds_a_promise_of_all_wrong() -> None:
    assert error_evidence(5, 5, 1.0) == 1.0


@pytest.mark.filterwarnings("ignore:.*repeat another's text")
def test_a_promise_of_another_way_to_predict_is_watched_too(tmp_path: Path) -> None:
    batches = {"one": rows_of(0, 80), "two": rows_of(1)}
    texts = {"text": [text for seed in (21, 22) for text in rows_of(seed)["text"]]}
    promise = {"calibration": rows_of(9, 120), "error": 0.4, "method": "exact"}
    promise["answer_unlike"] = True
    how: dict[str, Any] = QUICK | {"components": 1, "guide": "laplace", "max_steps": 40}
    last = bh.stream(tiny_model(()), batches, tmp_path, promise=promise, distill=texts, **how)
    assert last.promised is not None and last.promised.method == "exact"
    _, two = Record.of(last).rows
    assert two["promise/answered"] > 0


def test_a_round_without_a_watched_promise_does_not_begin_the_count_anew() -> None:
    posterior = fitted("class")
    rows = table("class", 200, 9)
    with pytest.warns(UserWarning, match="left out"):
        posterior = posterior.promise(rows, error=0.5)
    forecast = posterior.predict(table("class", 60, 12))
    alone = watched(forecast, posterior.lineage)
    before = {"promise/answered": 30.0, "promise/wrong": 3.0, "promise/error": 0.5}
    report = replace(posterior.report, metrics=before | {"promise/broken": 0.0})
    new_labels = replace(posterior.report, metrics={})
    for lineage in ((report,), (report, new_labels)):
        noted = watched(forecast, lineage)
        counts = alone["promise/answered"] + 30, alone["promise/wrong"] + 3
        assert noted["promise/evidence"] == pytest.approx(error_evidence(*map(int, counts), 0.5))


def test_a_round_whose_promise_cannot_be_made_is_saved_without_one(tmp_path: Path) -> None:
    """Its calibration rows have a label that comes later."""
    calibration = rows_of(9, 120)
    calibration["label"] = [*calibration["label"][:-1], 2]
    batches = {"one": rows_of(0), "two": {"text": ["w30 w31"] * 9, "label": [2] * 8 + [0]}}
    how: dict[str, Any] = QUICK | {"guide": "normal", "grow": True, "max_steps": 3}
    promise = {"calibration": calibration, "error": 0.4}
    with pytest.warns(UserWarning, match="promise: .*; this round has none"):
        last = bh.stream(tiny_model(()), batches, tmp_path, promise=promise, **how)
    assert len(last.lineage) == 2 and last.promised is not None
