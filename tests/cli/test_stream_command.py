"""`bhpeft stream`: batches from dates and counts, going on, record and plots."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from program import (
    bhpeft,
    error,
    read_csv,
    usage_error,
    write_csv,
    write_lines,
)
from saves import backbone_in

import bhpeft_pyro as bh
from bhpeft_pyro.cli.saved import open_run
from bhpeft_pyro.streams import History, Record, by_period
from bhpeft_pyro.testing import tiny_backbone, tiny_model, tiny_tokenizer

QUICK = ("--max-steps", 2, "--batch-size", 8, "--device", "cpu")
# Four rows a week from Monday the 1st of January 2024 on, in the file last day first.
DAYS = [(date(2024, 1, 1) + timedelta(days=2 * i)).isoformat() for i in range(14)][::-1]
TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(14)][::-1]
NAMES = ["good" if i % 2 else "bad" for i in range(14)][::-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backbone_in(tmp_path / "tiny")
    write_csv(tmp_path / "news.csv", date=DAYS, text=TEXTS, label=NAMES)
    return tmp_path


def arguments(folder: Path, *more: object, data: str = "news.csv") -> tuple[object, ...]:
    backbone = ("--backbone", folder / "tiny", "--preset", "head_only", "--components", 2)
    return ("stream", folder / data, "--out", folder / "out", *backbone, *QUICK, *more)


def rounds(folder: Path) -> list[Any]:
    return list(History(folder / "out" / "rounds").rounds.values())


def test_weeks_are_learnt_in_order_as_in_python(folder: Path) -> None:
    options = ("--by", "date", "--batch", "week", "--keep", 0.9, "--seed", 3, "--json")
    found = json.loads(bhpeft(*arguments(folder, *options)).stdout)["rounds"]
    table = Dataset.from_dict({"date": DAYS, "text": TEXTS, "label": NAMES})
    model = bh.tasks.categories(tiny_backbone(), 2, kinds=(), tokenizer=tiny_tokenizer())
    last = bh.stream(
        model, by_period(table, "date"), folder / "own", keep=0.9,
        columns=bh.Columns(label_names=("bad", "good")), seed=3, max_steps=2, batch_size=8,
        components=2, progress=False,
    )  # fmt: skip
    expected = Record.of(last).rows
    assert [row["batch"] for row in found] == [
        *("2024-01-01", "2024-01-08", "2024-01-15", "2024-01-22")
    ]
    for row, own in zip(found, expected, strict=True):
        for name in ("batch", "examples", "nll", "drift/nll_p"):
            assert row.get(name) == own.get(name), name
    assert [report.keep for report in rounds(folder)] == [1.0, 0.9, 0.9, 0.9]
    assert json.loads((folder / "out" / "record.json").read_text()) == found
    written = read_csv(folder / "out" / "record.csv")
    assert [row["batch"] for row in written] == [row["batch"] for row in found]
    assert (folder / "out" / "stream.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stream_is_its_last_round_until_it_branches(folder: Path) -> None:
    bhpeft(*arguments(folder, "--by", "date"))
    first, *_, last = rounds(folder)
    for place in ("out", "out/rounds"):
        assert open_run(folder / place, None, "cpu").report == last
        assert last.id in bhpeft("history", folder / place).stdout
    history = History(folder / "out" / "rounds")
    root = history.load(first.id, tiny_backbone(), tokenizer=tiny_tokenizer())
    history.add(root.update({"text": ["w5 w9", "w6 w7"], "label": ["bad", "good"]}))
    message = error("evaluate", folder / "out", folder / "news.csv")
    assert "has branches" in message and last.id in message
    assert open_run(folder / "out" / "rounds" / first.id, None, "cpu").report == first
    assert "no saved posterior" in error("evaluate", folder, folder / "news.csv")


def test_a_branch_is_moved_aside_and_the_stream_goes_on(folder: Path) -> None:
    options = arguments(folder, "--by", "date")
    bhpeft(*options)
    first, *_, last = rounds(folder)
    history = History(folder / "out" / "rounds")
    root = history.load(first.id, tiny_backbone(), tokenizer=tiny_tokenizer())
    branch = history.add(root.update({"text": ["w5 w9", "w6"], "label": ["bad", "good"]}))
    message = error(*options)
    assert "2 branches" in message and "--keep ROUND" in message
    assert "no round in " in error("history", folder / "out", "--keep", "zzz")
    assert "is a posterior" in error("history", history.folder / branch, "--keep", branch)
    shown = bhpeft("history", folder / "out", "--keep", last.id[:6])
    assert branch in shown.stderr and branch not in shown.stdout and last.id in shown.stdout
    assert (history.folder / "aside" / branch / "posterior.safetensors").exists()
    bhpeft(*options)
    assert [report.id for report in rounds(folder)][-1] == last.id


def test_a_folder_that_another_process_writes_into_is_no_bad_input(folder: Path) -> None:
    with History(folder / "out" / "rounds").writing():
        assert " is writing into " in error(*arguments(folder, "--by", "date"), code=1)


def test_a_killed_stream_goes_on_and_so_does_one_whose_file_has_grown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 5 rows a batch there are three, of which the third comes later."""
    write_csv(folder / "early.csv", date=DAYS[4:], text=TEXTS[4:], label=NAMES[4:])
    update, calls = bh.Posterior.update, []

    def dying(self: bh.Posterior, *args: Any, **options: Any) -> bh.Posterior:
        calls.append(len(self.lineage))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return update(self, *args, **options)

    monkeypatch.setattr(bh.Posterior, "update", dying)
    options = ("--by", "date", "--batch", 5)
    bhpeft(*arguments(folder, *options, data="early.csv"), code=130)
    assert len(rounds(folder)) == 1
    again = bhpeft(*arguments(folder, *options, data="early.csv"))
    assert "rounds that exist already: 1" in again.stderr
    first = [report.id for report in rounds(folder)]
    shown = bhpeft(*arguments(folder, *options)).stdout
    assert "rows 11-14" in shown and "drift/nll_z" in shown
    assert [report.id for report in rounds(folder)][:2] == first
    idle = bhpeft(*arguments(folder, *options))
    assert "none is new" in idle.stderr and "steps on" not in idle.stderr
    assert [report.examples for report in rounds(folder)] == [5, 5, 4]
    assert calls == [1, 1, 2]  # no round was learnt twice


@pytest.mark.parametrize("tests", [(), ("--tests", "40%")])
def test_a_last_batch_that_was_smaller_stays_and_the_table_may_grow(
    folder: Path, tests: tuple[str, ...]
) -> None:
    """It was filled up to 5 rows with those that had come, and refused as another batch."""
    options = ("--by", "date", "--batch", 5, *tests)
    for rows in (7, 8, 14):
        write_csv(folder / "news.csv", date=DAYS[-rows:], text=TEXTS[-rows:], label=NAMES[-rows:])
        bhpeft(*arguments(folder, *options))
    names = [report.name for report in rounds(folder)]
    assert names == ["rows 1-5", "rows 6-7", "rows 8-8", "rows 9-13", "rows 14-14"]
    assert "none is new" in bhpeft(*arguments(folder, *options)).stderr
    if not tests:
        assert sum(report.examples for report in rounds(folder)) == 14  # each row once


@pytest.mark.parametrize("rated", [False, True])
def test_held_out_rows_are_scored_after_every_round(folder: Path, rated: bool) -> None:
    """The record has minus the MSE of ratings."""
    if rated:
        stars = [1.5, 5.0, 1.0, 2.5, 3.0, 4.0, 2.0] * 2
        write_csv(folder / "news.csv", date=DAYS, text=TEXTS, label=stars)
    options = ("--by", "date", "--batch", 7, "--tests", "30%")
    found = json.loads(bhpeft(*arguments(folder, *options, "--json")).stdout)
    assert [row["examples"] for row in found["rounds"]] == [5, 5]
    history = History(folder / "out" / "rounds")
    last = history.load(history.leaves[0], tiny_backbone(), tokenizer=tiny_tokenizer())
    assert last.report.components
    shown = bhpeft(*arguments(folder, *options)).stdout.partition("After the last round")[2]
    assert ("mse" in shown, "accuracy" in shown) == (rated, not rated)
    scores = [line.split()[-2:] for line in shown.splitlines() if "rows " in line]
    *_, row = found["rounds"]
    assert scores == [
        [f"{abs(row[f'test/{name}']):.3f}", f"{row[f'test_nll/{name}']:.3f}"]
        for name in ("rows 1-7", "rows 8-14")
    ]


def test_tests_are_as_before(folder: Path) -> None:
    with_tests = arguments(folder, "--batch", 4, "--tests", "30%")
    bhpeft(*with_tests)
    found = error(*arguments(folder, "--batch", 4))
    assert "--tests: " in found and "holds rounds with tests; expected it as before" in found
    found = error(*arguments(folder, "--batch", 4, "--tests", "60%"))
    assert "with other data, or with another part held out for tests" in found
    bhpeft(*with_tests)


def test_a_batch_that_was_partly_held_out_is_not_learnt_again(folder: Path) -> None:
    bhpeft(*arguments(folder, "--batch", 7, "--tests", "30%"))
    new = write_csv(folder / "last.csv", text=TEXTS[7:], label=NAMES[7:])
    update = ("update", folder / "out", new, "--out", folder / "next")
    for share in ("0", "20%"):
        assert "round 2 " in error(*update, "--validation", share)


def test_a_table_that_has_grown_has_tests_its_first_rounds_have_not_seen(folder: Path) -> None:
    write_csv(folder / "early.csv", date=DAYS[7:], text=TEXTS[7:], label=NAMES[7:])
    options = ("--by", "date", "--batch", 7, "--tests", "30%", "--json")
    bhpeft(*arguments(folder, *options, data="early.csv"))
    for _ in range(2):  # and again, with nothing new
        found = json.loads(bhpeft(*arguments(folder, *options)).stdout)
        assert all("test/rows 1-7" in row for row in found["rounds"])
        assert ["test/rows 8-14" in row for row in found["rounds"]] == [False, True]


def test_a_batch_like_an_earlier_one_is_learnt_if_told_to(folder: Path) -> None:
    """Else a stream could not go on, as rows that have come cannot be taken back."""
    write_csv(
        folder / "twice.csv",
        date=["2024-01-01"] * 2 + ["2024-02-01"] * 2,
        text=["w5", "w6"] * 2,
        label=["bad", "good"] * 2,
    )
    options = ("--by", "date", "--batch", "day")
    assert "again=True" in error(*arguments(folder, *options, data="twice.csv"))
    bhpeft(*arguments(folder, *options, "--again", data="twice.csv"))
    assert [report.examples for report in rounds(folder)] == [2, 2]


def test_copies_are_learnt_or_tested(folder: Path) -> None:
    """The second batch's two tests are of texts that the first learns."""
    texts = [f"w{5 + i % 2} w{10 + i // 2}" for i in range(60)]
    rows = texts[:10] * 2 + [text.upper() for text in texts[:9]] + texts[40:51]
    write_csv(folder / "copies.csv", text=rows, label=["bad", "good"] * 20)
    said = bhpeft(*arguments(folder, "--batch", 20, "--tests", "20%", data="copies.csv")).stderr
    assert said.count("'rows 1-20' has the texts of 2 test rows (case and spaces aside)") == 1


def test_a_first_batch_of_one_class_is_named(folder: Path) -> None:
    for labels in (["good"] * 7 + ["bad"] * 7, [1] * 7 + [0] * 7):
        write_csv(folder / "one.csv", date=DAYS, text=TEXTS, label=labels)
        message = error(*arguments(folder, "--by", "date", "--batch", 7, "--grow", data="one.csv"))
        assert "the first batch, rows 1-7: column 'label': all 7 labels are" in message


@pytest.mark.parametrize("numbers", [False, True])
def test_labels_still_to_come_are_grown(numbers: bool, folder: Path) -> None:
    labels: list[Any] = [2 if i < 3 else i % 2 for i in range(14)]  # the last days have a third
    if not numbers:
        labels = [("bad", "good", "strange")[k] for k in labels]
    write_csv(folder / "news.csv", date=DAYS, text=TEXTS, label=labels)
    result = bhpeft(*arguments(folder, "--by", "date", "--batch", 7, "--grow"))
    assert "2 classes" in result.stderr
    history = History(folder / "out" / "rounds")
    last = history.load(history.leaves[0], tiny_backbone(), tokenizer=tiny_tokenizer())
    assert last.model.network.outputs == 3
    assert last.columns.label_names == (("0", "1", "2") if numbers else ("bad", "good", "strange"))


def test_posteriors_beside_a_stream_are_none_of_its_rounds(folder: Path) -> None:
    model = tiny_model(())
    fitted = bh.fit(model, "normal", {"text": TEXTS[:4], "label": [0, 1] * 2}, max_steps=1)
    fitted.save(folder / "out" / "reviews")
    result = bhpeft(*arguments(folder, "--by", "date", "--batch", 7))
    assert "exist already" not in result.stderr
    assert len(History(folder / "out" / "rounds").rounds) == 2
    rounds = folder / "out" / "rounds"
    fit = ("fit", folder / "news.csv", "--backbone", folder / "none", "--overwrite")
    for out in (rounds / "foo", rounds / History(rounds).leaves[-1], rounds):
        told = error(*fit, "--out", out)
        assert "is among the rounds of a stream; expected another folder" in told
    assert "--out" not in error("promise", folder / "out", folder / "news.csv")  # into the round
    fitted.save(folder / "out")
    assert "holds a posterior" in error(*arguments(folder, "--by", "date"))


def test_bad_input_is_refused_before_any_work(folder: Path) -> None:
    for more, message in (
        ((), "--by: a batch of a week needs a column of dates"),
        (("--by", "day"), "column 'day' is missing; columns there: date, text, label"),
        (("--by", "text"), "row 2: 'w6 w23 w27' is not a date"),
        (("--by", "date", "--grow", "--tests", "30%"), "labels still to come"),
        (("--by", "date", "--tests", "1%"), "0.01 is no row of any batch"),
    ):
        assert message in error(*arguments(folder, *more)), more
    for more, message in (
        (("--batch", "fortnight"), "expected one of day, week, month, quarter, year, or a number"),
        (("--batch", 0), "or a number of rows"),
        (("--guide", "delta"), "'delta' is not one of 'laplace', 'normal'"),
        (("--tests", "x.csv"), "'x.csv' is not a share"),
    ):
        assert message in usage_error(*arguments(folder, "--by", "date", *more)), more
    assert not (folder / "out").exists()


def test_no_file_that_is_read_is_replaced_and_none_is_a_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    data = write_csv(folder / "out" / "record.csv", date=DAYS, text=TEXTS, label=NAMES)
    more = ("--by", "date", "--backbone", folder / "none")  # nothing is loaded
    assert f"--out: {data} is the data" in error(*arguments(folder, *more, data="out/record.csv"))
    lines = write_lines(folder / "out" / "record.json", [{"text": "w5", "label": "good"}])
    for name in ("--promise", "--distill"):
        assert f"--out: {lines} is the data" in error(*arguments(folder, *more, name, lines))
    told = error(*arguments(folder, *more, "--out", folder / "news.csv"))
    assert "news.csv is a file; expected a folder" in told


def test_rows_of_later_batches_are_checked_first_and_counted_in_the_file(folder: Path) -> None:
    texts = [" " if i == 0 else text for i, text in enumerate(TEXTS)]  # of the last day
    write_csv(folder / "news.csv", date=DAYS, text=texts, label=NAMES)
    assert "column 'text', row 2: the text is empty" in error(*arguments(folder, "--by", "date"))
    assert not (folder / "out").exists()


def test_all_rows_are_checked_under_the_backbones_own_limit(folder: Path) -> None:
    """The check knew the tokenizer's limit alone, here none: of a text that is too long, in the
    last batch, it said nothing, and an earlier stream went on whatever --max-length said."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder / "tiny")
    texts = ["w5 " * 40, *TEXTS[1:]]  # of the last day
    write_csv(folder / "news.csv", date=DAYS, text=texts, label=NAMES)
    shown = bhpeft(*arguments(folder, "--by", "date")).stderr
    assert "1 of 14 texts are longer than 32 tokens and were cut" in " ".join(shown.split())
    too_long = error(*arguments(folder, "--by", "date", "--max-length", 33))
    own = error("fit", folder / "news.csv", "--out", folder / "fit", "--max-length", 33,
                "--backbone", folder / "tiny", "--device", "cpu")  # fmt: skip
    assert too_long == own and "the backbone has positions for 32 tokens" in own


def test_rounds_are_gone_on_with_as_they_were_read(folder: Path) -> None:
    table = {"date": DAYS, "text": TEXTS, "body": TEXTS[::-1], "label": NAMES}
    write_csv(folder / "news.csv", **table)
    bhpeft(*arguments(folder, "--by", "date"))
    found = error(*arguments(folder, "--by", "date", "--text-column", "body"))
    assert "columns.text" in found and "holds rounds with 'text', not 'body'" in found
    found = error(*arguments(folder, "--by", "date", "--max-length", 9))
    assert "columns.max_length" in found and "holds rounds with None, not 9" in found


def test_a_first_batch_has_no_scores_and_a_single_one_is_no_plural(folder: Path) -> None:
    shown = bhpeft(*arguments(folder, "--batch", 7)).stdout
    first = next(line for line in shown.splitlines() if "rows 1-7" in line)
    assert "nan" not in shown and first.split()[-1] == "-"
    again = bhpeft(*arguments(folder, "--batch", 14)[:2], "--out", folder / "one",
                   *arguments(folder, "--batch", 14)[4:])  # fmt: skip
    assert "\n1 batch\n" in again.stderr


def test_a_batch_too_small_to_be_tested_is_learnt_all_the_same(folder: Path) -> None:
    # Weeks of four and of three rows.
    result = bhpeft(*arguments(folder, "--by", "date", "--batch", "week", "--tests", "15%"))
    assert "2024-01-22: no test, as 0.15 of 3 rows is none, or all" in result.output
    assert "2024-01-15: no test" not in result.output
    assert len(rounds(folder)) == 4
