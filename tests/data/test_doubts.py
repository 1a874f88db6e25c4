"""Doubts about labels: what raises them, what must not, and that nothing is learnt before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from program import bhpeft, error, write_csv
from saves import backbone_in

import bhpeft_pyro as bh
from bhpeft_pyro.data import LabelWarning
from bhpeft_pyro.data.doubts import swapped, turned, warn_of_classes
from bhpeft_pyro.testing import tiny_model

TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(24)]
NAMES = ["good" if i % 2 else "bad" for i in range(24)]
SWAPPED = ["bad" if i % 2 else "good" for i in range(24)]


def said(labels: Sequence[str], known: Sequence[str] = ()) -> str:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_classes("label", labels, known)
    return "".join(str(each.message) for each in found)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("god", "'god' (may mean 'good') is there once"),
        ("ok", "'ok' is there once"),
        (
            "good;bad",
            """'good;bad' may be several labels (a list of them is JSON, ["good", "bad"])""",
        ),
        ("bad | ok", "'bad | ok' may be several labels"),
        ("good ", "'good' and 'good ' are two classes"),
    ],
)
def test_classes_that_may_be_mistakes(odd: str, message: str) -> None:
    assert message in said([*NAMES, odd])
    assert said([*NAMES, odd], known=["bad", "good", odd]) == ""


@pytest.mark.parametrize(
    "labels",
    [
        NAMES,
        ["Arts, Crafts", "Tools; Garden"] * 6,  # separators in names that have no part in common
        [*"abcdefghi"],  # too few to say
        ["a", "b", "b"],
    ],
)
def test_classes_that_are_none(labels: list[str]) -> None:
    assert said(labels) == ""


def test_real_numbers_are_not_misspelt() -> None:
    """Nor are versions that are the names of classes doubted, if each is there often."""
    numbers = [f"{k / 7:.2f}" for k in range(-12, 12)]
    assert said([*numbers, "3"]) == "column 'label': these are real numbers: --task ratings"
    assert said(["1.10", "1.9"] * 6) == ""


def test_many_doubts_are_counted() -> None:
    assert said([*NAMES, *"pqrst"]).count("is there once") == 3
    assert "and 2 more of this kind" in said([*NAMES, *"pqrst"])


def test_an_exchange_of_labels_is_found_among_many() -> None:
    truth = torch.arange(200) % 10
    noise = torch.Generator().manual_seed(0)
    wrong = torch.rand(200, generator=noise) < 0.2
    predicted = torch.where(wrong, torch.randint(10, (200,), generator=noise), truth)
    codes = torch.arange(10)
    codes[[2, 7]] = torch.tensor([7, 2])
    names = [*"abcdefghij"]
    assert str(swapped(predicted, codes[truth], names)).endswith("if 'c' and 'h' were swapped")
    assert swapped(predicted, truth, names) is None
    turn = swapped(predicted[truth < 3], (truth[truth < 3] + 1) % 3, names)
    assert str(turn).endswith("if 'a' meant 'c', 'b' meant 'a', 'c' meant 'b'")


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.02] * 50])
def test_chance_is_no_contradiction(shares: list[float]) -> None:
    """Neither forecasts that know nothing, nor classes that are rare."""
    torch.manual_seed(0)
    drawn = torch.multinomial(torch.tensor(shares), 2 * 100 * 500, replacement=True)
    pairs = drawn.reshape(500, 2, 100)
    names = [*map(str, range(len(shares)))]
    alarms = sum(swapped(*pair, names) is not None for pair in pairs)
    assert alarms <= 3  # of 500, at a level of 0.001


def test_a_forecast_of_one_class_is_no_contradiction() -> None:
    """As of a first round that knew but one class: all is wrong, and nothing says why."""
    assert swapped(torch.zeros(50).long(), torch.ones(50).long(), ["a", "b"]) is None
    assert swapped(torch.zeros(1).long(), torch.ones(1).long(), ["a", "b"]) is None
    assert turned(torch.ones(50), torch.arange(50.0)) is None


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_an_update_with_labels_swapped_warns_before_it_learns(guide: str) -> None:
    data = {"text": TEXTS, "label": NAMES}
    posterior = bh.fit(tiny_model(()), guide, data, max_steps=60, components=1, progress=False)
    again = {"again": True, "max_steps": 1}
    posterior.update(data, **again)
    steps: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelWarning)
        with pytest.raises(LabelWarning, match=r"9.% if 'bad' and 'good' were swapped"):
            posterior.update({"text": TEXTS, "label": SWAPPED}, again=True, callback=steps.append)
    assert steps == []
    with pytest.warns(LabelWarning):
        posterior.update({"text": TEXTS, "label": SWAPPED}, **again)


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


def test_ratings_that_are_turned_round_are_said() -> None:
    def rows(low: float, high: float) -> dict[str, object]:
        return {"text": TEXTS, "label": [high if i % 2 else low for i in range(24)]}

    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(3.0, 1.0))
    posterior = bh.fit(model, "normal", rows(1.0, 5.0), max_steps=60, progress=False)
    with pytest.warns(LabelWarning, match=r"by -0\.\d\d: the scale may be turned"):
        posterior.update(rows(5.0, 1.0), again=True, max_steps=1)
    posterior.update(rows(2.0, 4.0), again=True, max_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doubts")
    backbone_in(root / "tiny")
    write_csv(root / "train.csv", text=TEXTS, label=NAMES)
    write_csv(root / "swapped.csv", text=TEXTS, label=SWAPPED)
    write_csv(root / "typo.csv", text=TEXTS, label=["god", *NAMES[1:]])
    return root


def test_the_program_refuses_unless_told(folder: Path) -> None:
    tiny = ("--backbone", folder / "tiny", "--device", "cpu")
    how = (*tiny, "--preset", "head_only", "--guide", "normal", "--max-steps", 60)
    for command in (["fit"], ["compare"], ["stream", "--batch", 12]):
        told = error(*command, folder / "typo.csv", *tiny, "--out", folder / "no")
        assert "'god' (may mean 'good') is there once" in told and "--yes" in told
    result = bhpeft("fit", folder / "train.csv", *how, "--out", folder / "run")
    assert "\nbad 12, good 12\n" in result.stderr
    told = error("update", folder / "run", folder / "swapped.csv", "--out", folder / "run2")
    assert "swapped.csv: the labels contradict" in told
    assert "'bad' and 'good' were swapped" in told and not (folder / "run2").exists()
    yes = ("--yes", "--out", folder / "run2", "--max-steps", 1)
    result = bhpeft("update", folder / "run", folder / "swapped.csv", *yes)
    assert "note: data: the labels contradict" in result.stderr
