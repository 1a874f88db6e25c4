"""The task of a table, from its columns and labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from program import NAMES, TEXTS, error, write_csv

from bhpeft_pyro.cli.options import Reading
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data import table
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_backbone


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"text": ["a", "b"], "label": ["no", "yes"]}, "classes"),
        ({"text": ["a", "b"], "label": [1, 0]}, "classes"),
        ({"text": ["a", "b"], "label": [True, False]}, "classes"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "ratings"),
        ({"text": ["a", "b"], "rating": [1, 2]}, "ratings"),
        ({"question": ["a"], "choices": [["b", "c"]], "answer": [1]}, "choices"),
    ],
)
def test_the_task_is_that_of_columns_and_labels(columns, task):
    assert infer(table(columns), Reading()).name == task


@pytest.mark.parametrize(
    ("ratings", "levels"),
    [([1.0, 5.0, 3.0], 3), ([1, 2], 2), ([1.5, 4.0], 0), ([float(i) for i in range(12)], 0)],
)
def test_scales_of_few_whole_numbers_have_ends(ratings, levels):
    """Where the least and the greatest of many numbers are, chance decides."""
    rows = table({"text": ["w5"] * len(ratings), "stars": ratings})
    task = infer(rows, Reading())
    assert task.levels == levels
    likelihood = task.model(tiny_backbone(), None, ()).likelihood
    ends = (min(ratings), max(ratings)) if levels else (None, None)
    assert (likelihood.low, likelihood.high) == ends


@pytest.mark.parametrize("ratings", [["10", " 9", "2"], ["3.5", " 1.5", "2"]])
def test_ratings_that_are_texts_have_the_scale_of_their_numbers(ratings):
    """One cell in another form, such as " 9", makes a reader turn all the others into texts."""
    numbers = [*map(float, ratings)]
    of_texts, of_numbers = (
        infer(table({"text": ["w5"] * 3, "stars": column}), Reading())
        for column in (ratings, numbers)
    )
    assert of_texts == of_numbers
    assert of_texts.scale == (min(numbers), max(numbers))


@pytest.mark.parametrize("column", ["question", "choices"])
def test_a_label_may_have_the_name_of_a_column_of_choices(column):
    rows = table({"text": ["a", "b"], column: ["no", "yes"]})
    assert infer(rows, Reading(label_column=column)).name == "classes"


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([("w5 w7 won", "Sports"), ("w6 fell", "World"), ("w5 lost", "Sports")], "Sports"),
        ([("w5", "3.5"), ("w6", "2.25"), ("w7", "1.0")], "3.5"),
        ([("w5", "1"), ("w6", "0"), ("w7", "1")], "1"),
    ],
)
def test_a_file_without_a_header_loses_no_row(rows, column, tmp_path):
    """It was advised to name the column, "as in --label-column Sports", and that was followed."""
    path = tmp_path / "rows.csv"
    path.write_text("".join(f"{text},{label}\n" for text, label in rows))
    first_line = "the first line of the file may be a row; expected the names of the columns there"
    fit = ("fit", path, "--out", tmp_path / "run", "--backbone", tmp_path)
    told = error(*fit)
    assert first_line in told and "name it" not in told
    told = error(*fit, "--label-column", column)
    assert f"column '{column}': its name is like its cells; {first_line}" in told


def test_what_is_not_clear_is_asked():
    def rows(**columns):
        return table(columns)

    two = ["a", "b"]
    for columns, message in (
        (rows(text=two, label=[1, 5]), "--task classes, or --task ratings \\(if"),
        (rows(text=two, label=two, rating=[1, 2]), "label, rating may all be .*--label-column"),
        (
            rows(text=two, verdict=two),
            "columns there: text, verdict; name it, as in --label-column verdict$",
        ),
        (rows(title=two, body=two, label=two), "title, body may all be .*--text-column"),
        (rows(n=[1, 2], label=two), "no column is known to be the text"),
        (rows(text=two, label_name=two, of=two), "as in --label-column label_name$"),
        (rows(text=two, label=["a", "a"]), "at least two classes"),
        (rows(text=two, label=["a", None]), "row 1: the label is missing"),
        (rows(text=["a", None], label=["a", None]), "^row 1: all cells are empty; delete"),
        (rows(text=two, rating=[2, 2]), "all 2 ratings are 2"),
    ):
        with pytest.raises(DataError, match=message):
            infer(columns, Reading())
    with pytest.raises(DataError, match="row 0: 'a' is not a number"):
        infer(rows(text=two, label=two), Reading(task="ratings"))
    with pytest.raises(DataError, match="'answer'"):
        infer(rows(question=two, choices=[two, two]), Reading(task="choices"))
    quiz = rows(question=two, choices=[two, two], answer=[0, 1])
    for option in ("text", "pair"):
        with pytest.raises(DataError, match=f"--{option}-column: got 'body', but multiple choice"):
            infer(quiz, Reading(**{f"{option}_column": "body"}))


@pytest.mark.parametrize("cell", ["nan", "NA", "3,5", "inf"])
def test_a_cell_that_is_no_number_makes_no_classes_of_ratings(folder, tmp_path, cell):
    stars = [*(f"{1 + i / 7:.4f}" for i in range(19)), cell]
    data = write_csv(tmp_path / "films.csv", text=TEXTS, rating=stars)
    fit = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run")
    for more in ((), ("--task", "ratings")):
        assert re.search(rf"'rating', row 21: '?{cell}'?\b", error(*fit, *more))
    assert infer(table({"text": TEXTS, "rating": NAMES}), Reading()).name == "classes"
    commas = [star.replace(".", ",") for star in stars[:19]]
    data = write_csv(tmp_path / "films.csv", text=TEXTS[:19], rating=commas)
    assert "'rating', row 2: '1,0000' is not a number" in error(*fit)


def test_columns_and_classes_that_are_mixed_up_are_named():
    rows = {"text": TEXTS, "label": [*NAMES[:-1], f" {NAMES[0].upper()}"]}
    with pytest.warns(UserWarning, match=rf"' {NAMES[0].upper()}' .* are two classes"):
        infer(table(rows), Reading())
    with pytest.raises(DataError, match="'text' cannot be the text and the label"):
        infer(table(rows), Reading(label_column="text"))


def test_numbers_that_do_not_count_from_zero_are_names():
    rows = table({"text": ["a", "b", "c"], "label": [10, 2, 10]})
    task = infer(rows, Reading(task="classes"))
    assert task.columns.label_names == ("2", "10")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    hub = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    assert infer(table(hub), Reading()).columns.label_names == ("x", "y", "z")


def test_lists_are_several_labels(labels: Path) -> None:
    for name in ("train.csv", "train.jsonl"):
        task = infer(table(labels / name), Reading())
        assert str(task) == "labels: 'labels' from 'text', 2 labels (art, sport)"
    rows = {"text": ["w5", "w6"], "tokens": [["w5"], ["w6"]], "label": ["a", "b"]}
    assert infer(table(rows), Reading()).name == "classes"


@pytest.mark.parametrize("odd", ["['art', 'sport']", '["art"]', "[]"])
def test_a_list_among_classes_is_asked_about(odd: str, tmp_path: Path) -> None:
    """Also as pandas writes a column of lists, which is no JSON."""
    rows = table(write_csv(tmp_path / "train.csv", text=TEXTS, label=["art", odd] * 10))
    with pytest.raises(DataError, match=r"looks like a list; expected one in JSON") as raised:
        infer(rows, Reading())
    assert raised.value.rows == tuple(range(1, 20, 2))
    assert len(infer(rows, Reading(task="classes")).columns.label_names or ()) == 2


def test_a_class_in_brackets_is_no_list(tmp_path: Path) -> None:
    for odd in ("[spam]", "[" * 10**5, "{[1]}", "[{[]: 1}]"):
        write_csv(tmp_path / "train.csv", text=TEXTS, label=[odd, "ham"] * 10)
        assert infer(table(tmp_path / "train.csv"), Reading()).name == "classes"
