"""`bhpeft fit`: what is learnt, held out and saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from program import (
    FIFTH,
    NAMES,
    ONE,
    QUICK,
    TEXTS,
    bhpeft,
    error,
    loaded,
    read_csv,
    read_lines,
    write_csv,
    write_lines,
)

import bhpeft_pyro as bh
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.guides.mean_field import ScaledAdam

SIXTY = [f"w{5 + i % 2} w{10 + i // 2}" for i in range(60)]
LABELS = ["good" if i % 2 else "bad" for i in range(60)]


def test_fit_as_json_is_all_there_is_on_stdout(folder, tmp_path):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", "--out", tmp_path / "run")
    result = bhpeft(*fit, *QUICK, "--json", "--validation", "25%")
    found = json.loads(result.stdout)
    assert (found["round"], found["examples"], found["steps"]) == (1, 15, 5 * 4)  # the default's
    assert 0 <= found["held_out"]["accuracy"] <= 1
    assert "20 rows, classes: 'label' from 'text', 2 classes (bad, good)" in result.stderr
    other = write_csv(tmp_path / "other.csv", text=[f"{text} w9" for text in TEXTS], label=NAMES)
    result = bhpeft(*fit, "--overwrite", *ONE, "--validation", other, "--json")
    assert json.loads(result.stdout)["examples"] == 20  # a file leaves all rows to learn from
    wrong = error(*fit, "--overwrite", "--validation", "1%")
    assert "--validation: 0.01 of 20 rows is 0" in wrong


def test_rows_are_held_out_as_fit_does_unless_a_share_is_given(folder, tmp_path):
    """Of few rows none are; of more, those that `fit` in Python takes with the same seed."""
    fit = ("--backbone", folder / "tiny", *ONE, "--preset", "head_only", "--out", tmp_path / "run")
    few = bhpeft("fit", folder / "train.csv", *fit)
    assert "--validation 20% does" in few.stderr and "fitting head_only" in few.stderr
    texts = [f"w{5 + i % 2} w{10 + i % 30} w{40 - i // 30}" for i in range(60)]
    more = write_csv(tmp_path / "more.csv", text=texts, label=NAMES * 3)
    result = bhpeft("fit", more, *fit, "--overwrite", "--json")
    run = loaded(tmp_path / "run", folder)
    said = [line for line in result.stderr.splitlines() if not line.startswith("note")]
    first = said.index(run.report.score)
    assert re.match(r"accuracy [01]\.\d+ ± 0\.\d+ on 12 held-out rows", said[first])
    assert said[first + 1].startswith(f"next: bhpeft predict {tmp_path / 'run'} ")
    assert "steps on 48 examples" in said[first + 2]
    train, held_out = run.encode({"text": texts, "label": NAMES * 3}).hold_out(0)
    assert (run.report.examples, run.report.held_out) == (len(train), len(held_out)) == (48, 12)
    assert json.loads(result.stdout)["held_out"] == pytest.approx(
        metrics.evaluate(run.predict(held_out))
    )


def test_an_interrupted_fit_leaves_the_saved_round(folder, tmp_path, monkeypatch):
    arguments = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *ONE)
    bhpeft(*arguments, "--out", tmp_path / "run", "--validation", 0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    steps = []
    step = ScaledAdam.step

    def interrupted(self, *rest):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(ScaledAdam, "step", interrupted)
    result = bhpeft(*arguments, "--out", tmp_path / "run", "--overwrite", code=130)
    assert "Traceback" not in result.output
    update = ("update", tmp_path / "run", folder / "train.csv", "--again")
    bhpeft(*update, "--out", tmp_path / "two")
    steps.clear()
    bhpeft(*update, "--out", tmp_path / "run", "--overwrite", code=130)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_ratings(folder, tmp_path):
    stars = [float(1 + i % 5) for i in range(20)]
    data = write_csv(tmp_path / "films.csv", review=TEXTS, stars=stars)
    arguments = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run", *ONE)
    result = bhpeft(*arguments, *FIFTH, "--preset", "lora", "--json")
    assert "ratings: 'stars' from 'review', between 1 and 5" in result.stderr
    assert "sd 1.41\nnote: there are 5 different ratings: intervals end at 1 and 5" in result.stderr
    assert "mse" in json.loads(result.stdout)["held_out"]
    bhpeft("predict", tmp_path / "run", data, "--out", tmp_path / "out.csv", "--samples", 4)
    rows = read_csv(tmp_path / "out.csv")
    # Their sd is above 1: without ends these intervals would be wider than the scale.
    assert all(1 <= float(row["lower_90"]) < float(row["upper_90"]) <= 5 for row in rows)
    forecast = loaded(tmp_path / "run", folder).predict(str(data), 4)
    lower, upper = forecast.interval(0.9)
    for name, values in (
        ("prediction", forecast.mean),
        ("sd", forecast.sd),
        ("lower_90", lower),
        ("upper_90", upper),
        ("epistemic", forecast.epistemic),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-6)


def test_multiple_choice(folder, tmp_path):
    rows = [
        {"question": text, "choices": [f"w{i + 9}", f"w{i + 20}", "w7"][: 2 + i % 2], "answer": 0}
        for i, text in enumerate(TEXTS[:12])
    ]
    data = write_lines(tmp_path / "quiz.jsonl", rows)
    arguments = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run", *QUICK)
    result = bhpeft(*arguments, "--guide", "delta")
    assert "12 rows, choices: 'answer' from 'question and choices'" in result.stderr
    result = bhpeft("predict", tmp_path / "run", data)
    assert (
        "flagged (the least certain by total uncertainty)" in result.stderr
    )  # a point guide has no epistemic uncertainty
    fitted = loaded(tmp_path / "run", folder)
    assert isinstance(fitted.guide, MeanFieldGuide) and fitted.point
    forecast = fitted.predict(str(data), 0)
    found = read_lines(tmp_path / "quiz-predictions.jsonl")
    assert [row["prediction"] for row in found] == forecast.label.tolist()
    assert [row["choices"] for row in found] == [row["choices"] for row in rows]
    again = ("update", tmp_path / "run", data, "--out", tmp_path / "next", "--again")
    assert "cannot be a prior" in error(*again)


def test_choices_of_a_csv_are_json_as_predict_writes_them(folder, tmp_path):
    choices = [json.dumps(["w9", f"w{20 + i}"]) for i in range(12)]
    data = write_csv(tmp_path / "quiz.csv", question=TEXTS[:12], choices=choices, answer=[0, 1] * 6)
    fit = ("fit", data, "--backbone", folder / "tiny", *QUICK, "--guide", "delta")
    bhpeft(*fit, "--out", tmp_path / "run")
    bhpeft("predict", tmp_path / "run", data)
    for name in ("quiz.csv", "quiz-predictions.csv"):
        bhpeft("evaluate", tmp_path / "run", tmp_path / name)
    data = write_csv(tmp_path / "no.csv", question=["w5"], choices=["w6, w7"], answer=[0])
    assert "column 'choices', row 2: 'w6, w7' is not a list" in error(
        "evaluate", tmp_path / "run", data
    )


def test_the_answer_is_a_text_in_a_column_of_any_name(folder, tmp_path):
    """A number in a CSV file is the choice of that name, in a fit as in what follows it."""
    choices, key = [json.dumps(["1", "2", "3"])] * 12, ["1", "2"] * 6
    data = write_csv(tmp_path / "quiz.csv", question=TEXTS[:12], choices=choices, key=key)
    fit = ("fit", data, "--backbone", folder / "tiny", *QUICK, "--guide", "delta")
    bhpeft(*fit, "--task", "choices", "--label-column", "key", "--out", tmp_path / "run")
    posterior = bh.Posterior.load(tmp_path / "run")
    assert posterior.report.data == posterior.encode(data).fingerprint
    assert posterior.encode(data).labels.tolist() == [0, 1] * 6


def test_labels_of_a_validation_file_may_be_positions_which_is_said(
    tmp_path: Path, copied: tuple[object, ...]
) -> None:
    first = write_csv(tmp_path / "first.csv", text=SIXTY[:40], label=LABELS[:40])
    numbers = [sorted({*LABELS}).index(label) for label in LABELS[40:]]
    rows = [{"text": t, "label": n} for t, n in zip(SIXTY[40:], numbers, strict=True)]
    other = write_lines(tmp_path / "other.jsonl", rows)
    said = bhpeft("fit", first, *copied, "--guide", "delta", "--validation", other).stderr
    assert "labels are numbers: 0 stands for" in said


def test_rows_are_counted_in_the_file_and_all_checked_before_the_fit(folder, tmp_path, monkeypatch):
    def work(*_args, **_more):
        raise AssertionError("trained")

    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", work)
    fit = ("--backbone", folder / "tiny", "--out", tmp_path / "out", *QUICK)
    rows = loaded(folder / "run", folder).encode(folder / "train.csv")
    for part in rows.hold_out(0, 0.2):  # one row that is kept, one that is held out
        row = rows.texts.index(part.texts[0])
        texts = [" " if i == row else f"{each} w3" for i, each in enumerate(TEXTS)]
        data = write_csv(tmp_path / "bad.csv", text=texts, label=NAMES)
        for command in (("fit", data, *fit), ("update", folder / "run", data, "--out", "x")):
            assert f"bad.csv, column 'text', row {row + 2}: the text is empty" in error(*command)
        new = write_csv(tmp_path / "new.csv", text=[f"{t} w3" for t in TEXTS], label=NAMES)
        for command in (("fit", new, *fit), ("update", folder / "run", new, "--out", "x")):
            assert re.search(
                rf"--validation bad.csv, column 'text', row {row + 2}: the text",
                error(*command, "--validation", data),
            )
    labels = ["odd" if i == row else name for i, name in enumerate(NAMES)]  # a held-out one
    odd = write_csv(tmp_path / "odd.csv", text=[f"{t} w3" for t in TEXTS], label=labels)
    assert "grow=True" in error("update", folder / "run", odd, "--out", "x")


def test_components_are_one_run(folder, tmp_path):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *QUICK, "--components")
    bhpeft(*fit, 3, "--seed", 5, "--tau", 2.0, "--out", tmp_path / "run")
    components = loaded(tmp_path / "run", folder).components
    assert [part.report.options.seed for part in components] == [5, 1005, 2005]
    assert [part.report.tau for part in components] == [2.0] * 3
    none = bhpeft(*fit, 0, "--out", tmp_path / "none", code=2)
    assert "'--components'" in none.stderr and not (tmp_path / "none").exists()


def test_texts_that_look_like_numbers_are_texts(folder, tmp_path):
    data = write_csv(tmp_path / "codes.csv", text=range(20), other=["w5", "w6"] * 10, label=NAMES)
    fit = ("fit", data, "--pair-column", "other", "--backbone", folder / "tiny")
    said = bhpeft(*fit, "--out", tmp_path / "run", *ONE).stderr
    assert "classes: 'label' from 'text and other'" in said


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> tuple[object, ...]:
    """Options of a fit."""
    options = ("--preset", "head_only", "--max-steps", 1, "--components", 1, "--device", "cpu")
    return ("--backbone", folder / "tiny", *options, "--out", tmp_path / "run", "--overwrite")


@pytest.mark.parametrize("guide", ["laplace", "normal"])  # which needs held-out rows, and which not
def test_a_fit_counts_them(tmp_path: Path, copied: tuple[object, ...], guide: str) -> None:
    texts = SIXTY + [text.upper() for text in SIXTY]
    table = write_csv(tmp_path / "in.csv", text=texts, label=LABELS * 2)
    said = bhpeft("fit", table, *copied, "--guide", guide).stderr
    assert said.count("note: 60 of 120 rows repeat another's text") == 1


def test_rows_that_are_all_alike_cannot_be_held_out(
    tmp_path: Path, copied: tuple[object, ...]
) -> None:
    table = write_csv(tmp_path / "same.csv", text=["w5"] * 60, label=LABELS)
    expected = "--validation: 0.2 of 60 rows is 12, and 59 repeat another's text; expected another"
    assert expected in error("fit", table, *copied, "--validation", "20%")
    said = bhpeft("fit", table, *copied, code=2).stderr
    assert "too few different rows to hold some out" in said
    assert "note: 59 of 60 rows repeat another's text" in said
    assert "all 60 texts have the same features" in said


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_validation_file_is_of_rows_that_are_not_learnt(
    tmp_path: Path, copied: tuple[object, ...], guide: str
) -> None:
    first = write_csv(tmp_path / "first.csv", text=SIXTY[:40], label=LABELS[:40])
    other = write_csv(tmp_path / "other.csv", text=SIXTY[20:], label=LABELS[20:])
    learn = ("fit", first, *copied, "--guide", guide, "--validation")
    all_alike = "validation: each of the 40 rows has the text of a row that is learnt"
    assert all_alike in error(*learn, first)
    said = bhpeft(*learn, other).stderr
    assert said.count("note: validation: 20 of 40 rows have the text of a row") == 1
    update = ("update", tmp_path / "run", other, "--max-steps", 1, "--out", tmp_path / "next")
    assert all_alike in error(*update, "--validation", other)
    wrong = error(*update, "--validation", first)
    assert "validation: round 1 (" in wrong and "has learnt 40 of these examples" in wrong


def test_errors_name_the_row(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "w5", "labels": ["a", "b"]}, {"text": "w6", "labels": ["a", " "]}]
    bad = write_lines(tmp_path / "bad.jsonl", rows)
    wrong = error("fit", bad, "--backbone", folder / "tiny", "--out", tmp_path / "no")
    assert "bad.jsonl, column 'labels', line 2: the label is empty" in wrong
