"""Bars: one for a whole fit, with the truth about how much of it is left."""

from __future__ import annotations

import re
from typing import Any

import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.base.progress import bars, told_to, tracked, work
from bhpeft_pyro.posterior import jobs
from bhpeft_pyro.testing import tiny_examples, tiny_model

States = list[tuple[str, float, str]]


@pytest.fixture
def states() -> States:
    return []


def listening(states: States) -> Any:
    """Keep every state of a bar: title, share that is done, and note."""
    return told_to(lambda title, share, note: states.append((title, share or 0.0, note)))


def fit(states: States, guide: str = "laplace", **how: Any) -> bh.Posterior:
    rows, more = tiny_examples(24), tiny_examples(12, seed=1)
    with listening(states):
        return bh.fit(tiny_model(), guide, rows, validation=more, max_steps=4, **how)


def test_a_fit_has_one_bar_for_all_its_parts(states):
    fit(states, components=2)
    titles = [*dict.fromkeys(title for title, _, _ in states)]
    for number in (1, 2):
        for part in ("training", "width"):
            assert f"component {number} of 2, {part}" in titles
    own = [(n, note) for title, n, note in states if title.startswith("component")]
    # The frozen states are read before, with a bar of their own.
    shares = [n for title, n, _ in states if n and title != "reading frozen states"]
    assert shares == sorted(shares) and max(shares) == pytest.approx(1.0)
    for number in (1, 2):  # neither training nor the widths fill all that is left
        start = (number - 1) / 2.2
        done = [n for title, n, _ in states if title == f"component {number} of 2, training"]
        assert done[-1] == pytest.approx(start + 0.8 / 2.2)
        done = [n for title, n, _ in states if title == f"component {number} of 2, width"]
        assert done[-1] == pytest.approx(start + (0.8 + 0.2 * 2 / 3) / 2.2)
    assert max(n for n, _ in own) == pytest.approx(2 / 2.2)
    assert not any("training, predicting" in title for title in titles)
    notes = {note for _, note in own if note}
    assert all(re.fullmatch(r"loss \d\.\d{3}(, held-out NLL \d\.\d{3})?", n) for n in notes)
    assert any("held-out NLL" in note for note in notes)


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_predictions_have_a_bar(guide, states):
    posterior, rows = fit(states, guide, components=2, progress=False), tiny_examples(12)
    with listening(states):
        posterior.predict(rows, samples=8)
    assert {title for title, _, _ in states} == {"predicting", "reading frozen states"}
    shares = [n for title, n, _ in states if title == "predicting"]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0.5 in shares


def test_a_stream_has_one_bar(states, tmp_path):
    weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(2)}
    with listening(states):
        bh.stream(tiny_model(()), weeks, tmp_path, components=2, max_steps=2)
    titles = {title for title, _, _ in states}
    assert {"round 1 of 2, component 2 of 2, training", "round 2 of 2, predicting"} <= titles
    own = [(title, n) for title, n, _ in states if title.startswith("round")]
    assert [n for _, n in own] == sorted(n for _, n in own)
    for number, part in ((1, 1), (2, 1), (1, 2), (2, 2)):  # nothing else moves it
        name = f"round {number} of 2, component {part} of 2, training"
        done = [n for title, n in own if title == name]
        each = 1 / 2 / 2.2
        start = (number - 1) / 2 + (part - 1) * each
        assert start <= min(done) <= start + each / 2
        assert max(done) == pytest.approx(start + 0.8 * each)


def test_without_progress_there_is_no_bar(states):
    first, rows = fit(states, components=2, progress=False), tiny_examples(12, seed=5)
    with listening(states):
        first.update(rows, max_steps=2)  # the option of the last round
    assert not states
    with listening(states), bars(False), bars(True):
        assert [*tracked([1, 2], "counting", 2)] == [1, 2] and not states


def test_workers_have_none(states):
    def learner(count: int) -> int:
        with work("working", 1) as one:
            one.next()
        return count

    with listening(states):
        own = jobs._pickled((learner, (1,), []))
        done = jobs._unpickled(jobs._job(jobs._pickled([]), own))
    assert done == 1 and not states


def test_bars_stay_out_of_what_is_no_terminal(capsys):
    bh.fit(tiny_model(), "normal", tiny_examples(12), max_steps=2)
    assert capsys.readouterr().err == ""


def test_a_bar_goes_when_its_work_fails(states):
    with listening(states):
        with pytest.raises(ZeroDivisionError), work("dividing", 2):
            next(tracked([1, 2], "", 2))
            raise ZeroDivisionError
        with work("again") as again:
            assert again.outer is None
