"""Validation data during a fit: what is looked at, when, and what is gone back to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import LowRankGuide
from bhpeft_pyro.inference import optimise
from bhpeft_pyro.testing import tiny_examples, tiny_model


def turned(examples: bh.Examples) -> bh.Examples:
    """With the opposite labels: whatever is learnt makes these worse."""
    assert examples.labels is not None
    return replace(examples, labels=1 - examples.labels)


@pytest.mark.parametrize("guide", ["linear", {"head.*": "lowrank", "*": "delta"}])
def test_a_joint_guide_is_not_taken_back_to_where_it_has_no_covariance(guide: Any) -> None:
    """Worse from the first step on, it is stopped as soon as it may be, with what it has then."""
    posterior = bh.fit(
        tiny_model(aligned=True),
        guide,
        tiny_examples(64),
        validation=turned(tiny_examples(32, seed=3)),
        max_steps=60,
        eval_every=2,
        patience=2,
        progress=False,
    )
    report = posterior.report
    assert report.best_step is not None and report.best_step > 36
    assert report.steps == report.best_step + 4 < 60
    blocks = posterior.guide.blocks()  # type: ignore[operator]
    joint = next(block for block in blocks if isinstance(block, LowRankGuide))
    assert joint.covariance.rank > 0
    assert "validation_nll" in report.history[1]  # looked at from the start all the same


def test_a_joint_guide_has_no_maximum_likelihood() -> None:
    for guide in ("linear", {"head.*": "full", "*": "delta"}):
        with pytest.raises(ConfigError, match="temperature=0 is maximum likelihood"):
            bh.fit(tiny_model(), guide, tiny_examples(8), temperature=0.0, progress=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The draws that each evaluation of a fit asks for."""
    asked: list[int] = []

    def spied(model: Any, guide: Any, data: Any, samples: int, **how: Any) -> Any:
        asked.append(samples)
        return bh.inference.predict.predict(model, guide, data, samples, **how)

    monkeypatch.setattr(optimise, "predict", spied)
    return asked


@pytest.mark.parametrize(("guide", "expected"), [("normal", 5), ("delta", 0)])
def test_draws_of_an_evaluation_are_as_asked_for_with_one_particle(
    guide: str, expected: int, asked: list[int]
) -> None:
    bh.fit(
        tiny_model(()),
        guide,
        tiny_examples(8),
        validation=tiny_examples(8, seed=1),
        max_steps=2,
        eval_every=1,
        particles=1,
        eval_samples=5,
        progress=False,
    )
    assert asked == [expected] * 2


def test_before_there_is_a_covariance_the_mean_is_looked_at(asked: list[int]) -> None:
    """Draws would be the prior's, and their NLL fall off a cliff once one is measured."""
    rows = tiny_examples(8, seed=1)
    options: dict[str, Any] = {"max_steps": 10, "eval_every": 2, "eval_samples": 5}
    bh.fit(tiny_model(()), "lowrank", rows, validation=rows, progress=False, **options)
    assert asked == [0, 0, 0, 5, 5]  # the first six steps are at the mean


def test_a_fit_of_less_than_an_epoch_is_looked_at_once() -> None:
    rows = tiny_examples(64)
    posterior = bh.fit(tiny_model(()), "normal", rows, validation=rows, max_steps=2, progress=False)
    assert ["validation_nll" in entry for entry in posterior.report.history] == [False, True]


def test_without_patience_the_last_state_is_kept() -> None:
    data, bad = tiny_examples(32), turned(tiny_examples(32, seed=3))
    options: dict[str, Any] = {"max_steps": 20, "progress": False}
    looked = bh.fit(tiny_model(()), "normal", data, validation=bad, eval_every=5, **options)
    plain = bh.fit(tiny_model(()), "normal", data, **options)
    for name, value in plain.guide.state_dict().items():
        assert torch.equal(value, looked.guide.state_dict()[name])


def test_an_evaluation_that_is_not_finite_is_not_the_best_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No number is smaller than NaN, so it would be kept for good."""
    found = iter([float("nan"), 0.5, 0.7, 0.9])
    monkeypatch.setattr(optimise, "evaluate", lambda forecast: {"nll": next(found)})
    posterior = bh.fit(
        tiny_model(()),
        "normal",
        tiny_examples(8),
        validation=tiny_examples(8, seed=1),
        max_steps=20,
        eval_every=1,
        patience=2,
        progress=False,
    )
    assert (posterior.report.best_step, posterior.report.steps) == (2, 4)


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
