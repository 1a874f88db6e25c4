"""Rows with the same text, in the program: never learnt and held out, and counted in a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import bhpeft, error, write_csv
from saves import backbone_in

TEXTS = [f"w{5 + i % 2} w{10 + i // 2}" for i in range(60)]
NAMES = ["good" if i % 2 else "bad" for i in range(60)]


@pytest.fixture
def fit(tmp_path: Path) -> tuple[object, ...]:
    """Options of a fit."""
    backbone_in(tmp_path / "tiny")
    options = ("--preset", "head_only", "--max-steps", 1, "--components", 1, "--device", "cpu")
    return ("--backbone", tmp_path / "tiny", *options, "--out", tmp_path / "run", "--overwrite")


@pytest.mark.parametrize("guide", ["laplace", "normal"])  # which needs held-out rows, and which not
def test_a_fit_counts_them(tmp_path: Path, fit: tuple[object, ...], guide: str) -> None:
    texts = TEXTS + [text.upper() for text in TEXTS]
    table = write_csv(tmp_path / "in.csv", text=texts, label=NAMES * 2)
    said = bhpeft("fit", table, *fit, "--guide", guide).stderr
    assert said.count("note: 60 of 120 rows repeat another's text") == 1


def test_rows_that_are_all_alike_cannot_be_held_out(
    tmp_path: Path, fit: tuple[object, ...]
) -> None:
    table = write_csv(tmp_path / "same.csv", text=["w5"] * 60, label=NAMES)
    expected = "--validation: 0.2 of 60 rows is 12, and 59 repeat another's text; expected another"
    assert expected in error("fit", table, *fit, "--validation", "20%")
    said = bhpeft("fit", table, *fit, code=2).stderr
    assert "too few different rows to hold some out" in said
    assert "note: 59 of 60 rows repeat another's text" in said
    assert "all 60 texts have the same features" in said


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_validation_file_is_of_rows_that_are_not_learnt(
    tmp_path: Path, fit: tuple[object, ...], guide: str
) -> None:
    first = write_csv(tmp_path / "first.csv", text=TEXTS[:40], label=NAMES[:40])
    other = write_csv(tmp_path / "other.csv", text=TEXTS[20:], label=NAMES[20:])
    learn = ("fit", first, *fit, "--guide", guide, "--validation")
    all_alike = "--validation: each of the 40 rows has the text of a row that is learnt"
    assert all_alike in error(*learn, first)
    said = bhpeft(*learn, other).stderr
    assert said.count("note: --validation: 20 of 40 rows have the text of a row") == 1
    update = ("update", tmp_path / "run", other, "--max-steps", 1, "--out", tmp_path / "next")
    assert all_alike in error(*update, "--validation", other)
    wrong = error(*update, "--validation", first)
    assert "validation: round 1 (" in wrong and "has learnt 40 of these examples" in wrong


def test_a_stream_tests_none_that_it_learns(tmp_path: Path, fit: tuple[object, ...]) -> None:
    own = TEXTS[:10] * 2 + [text.upper() for text in TEXTS[:9]] + TEXTS[40:51]
    write_csv(tmp_path / "in.csv", text=own, label=(NAMES * 2)[:40])
    stream = ("stream", tmp_path / "in.csv", *fit[:-1], "--batch", 20, "--tests", "20%")
    said = bhpeft(*stream).stderr  # the second batch's two tests are of texts that the first learns
    assert said.count("'rows 1-20' has the texts of 2 test rows (case and spaces aside)") == 1
