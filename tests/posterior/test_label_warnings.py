"""Labels that contradict a posterior, or that it has never seen: an update says so before it learns
them."""

from __future__ import annotations

import warnings

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.data import LabelWarning
from bhpeft_pyro.posterior.update import _below_chance, _negative_correlation
from bhpeft_pyro.testing import tiny_model

TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(24)]
NAMES = ["good" if i % 2 else "bad" for i in range(24)]
SWAPPED = ["bad" if i % 2 else "good" for i in range(24)]


@pytest.mark.parametrize(("classes", "right", "warns"), [(2, 39, True), (2, 41, False), (4, 10, 1)])
def test_chance_is_left_by_two_standard_errors(classes: int, right: int, warns: bool) -> None:
    """Of 100 rows chance has 50 ± 5, or 25 ± 4.3."""
    labels = torch.arange(100) % classes
    predicted = torch.where(torch.arange(100) < right, labels, (labels + 1) % classes)
    told = _below_chance(torch.eye(classes)[predicted], labels)
    assert told == (
        f"it predicts {right}% of 100 rows as labelled, and chance {100 // classes}%"
        if warns
        else None
    )


def test_a_few_rows_are_no_contradiction() -> None:
    assert _below_chance(torch.eye(2)[[0, 0, 0, 0]], torch.ones(4).long()) is None
    assert _below_chance(torch.zeros(0, 2), torch.zeros(0).long()) is None
    assert _negative_correlation(torch.ones(1), torch.ones(1)) is None
    assert _negative_correlation(torch.arange(5.0), -torch.arange(5.0)) is None
    assert _negative_correlation(torch.ones(50), torch.arange(50.0)) is None


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_an_update_with_labels_swapped_warns_before_it_learns(guide: str) -> None:
    data = {"text": TEXTS, "label": NAMES}
    posterior = bh.fit(tiny_model(()), guide, data, max_steps=60, components=1, progress=False)
    posterior.update(data, again=True, max_steps=1)
    swapped = {"text": TEXTS, "label": SWAPPED}
    steps: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelWarning)
        told = r"before learning, it predicts .?.% of 24 rows as labelled, and chance 50%"
        with pytest.raises(LabelWarning, match=told):
            posterior.update(swapped, again=True, callback=steps.append)
    assert steps == []
    with pytest.warns(LabelWarning) as once:
        posterior.update(swapped, again=True, max_steps=1)
    assert len(once) == 1


def test_new_classes_do_not_contradict_what_never_heard_of_them() -> None:
    """They are predicted as old ones, each as another."""
    old = {"text": TEXTS, "label": NAMES}
    posterior = bh.fit(tiny_model(()), "normal", old, max_steps=60, progress=False)
    new = {"text": TEXTS, "label": [*NAMES[:2], *("poor", "fine") * 11]}
    for start in (posterior, posterior.grow(["fine", "poor"])):
        grown = start.update(new, grow=True, again=True, max_steps=1)
        assert grown.columns.label_names == ("bad", "good", "fine", "poor")


def test_a_round_without_an_earlier_class_is_said_before_it_learns() -> None:
    posterior = bh.fit(
        tiny_model(()), "normal", {"text": TEXTS, "label": NAMES}, max_steps=5, progress=False
    )
    new = {"text": TEXTS, "label": ["fine"] * 24}
    for start in (posterior, posterior.grow(["fine"])):
        with pytest.warns(LabelWarning, match="all rows have labels that are new"):
            start.update(new, grow=True, again=True, max_steps=1)
    # Once it has been learnt, a round of it alone is one of many weeks.
    with pytest.warns(LabelWarning):
        third = posterior.update(new, grow=True, again=True, max_steps=5)
    third.update(new, again=True, max_steps=1)


def test_a_scale_that_is_reversed_is_said() -> None:
    def rows(low: float, high: float) -> dict[str, object]:
        return {"text": TEXTS, "label": [high if i % 2 else low for i in range(24)]}

    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(3.0, 1.0))
    posterior = bh.fit(model, "normal", rows(1.0, 5.0), max_steps=60, progress=False)
    with pytest.warns(LabelWarning, match=r"for 24 rows have a correlation of -0\.\d\d with"):
        posterior.update(rows(5.0, 1.0), again=True, max_steps=1)
    posterior.update(rows(2.0, 4.0), again=True, max_steps=1)
