"""`bhpeft promise`: what it says, and which rows `bhpeft predict` then answers."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from program import NAMES, TEXTS, bhpeft, error, loaded, read_csv, write_csv

import bhpeft_pyro as bh
from bhpeft_pyro.cli.answer_commands import promise
from bhpeft_pyro.cli.saved import say_dropped
from bhpeft_pyro.decisions.novelty import Novelty

HALF = ("--max-share-to-people", "50%")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    texts = [f"w{5 + i % 2} w{11 + i % 30} w{9 + i // 30}" for i in range(100)]
    names = ["good" if i % 2 else "bad" for i in range(100)]
    return write_csv(tmp_path / "calibration.csv", text=texts, label=names)


def test_it_says_what_is_promised_and_predict_answers(copied, calibration, folder, posterior):
    done = bhpeft("promise", copied, calibration, *HALF, "--device", "cpu")
    expected = posterior.promise(str(calibration), max_share_to_people=0.5).promised
    after = loaded(copied, folder)
    assert str(after.promised) == str(expected)
    said = done.stdout.replace("\n", " ")
    for line in str(expected).splitlines():  # word for word
        assert " ".join(line.split()) in " ".join(said.split())
    assert "texts like the 100 calibration rows" in str(expected) and "confidence 90%" in said
    out = copied.parent / "out.csv"
    done = bhpeft("predict", copied, folder / "new.csv", "--out", out, "--device", "cpu")
    answered = after.predict(str(folder / "new.csv")).answered
    assert [row["answered"] for row in read_csv(out)] == [str(a) for a in answered.tolist()]
    assert f"{answered.sum()} of 5 answered, for people: " in done.stderr
    assert f"promised: {expected.in_short}\n" in done.stderr
    assert "calibration rows: of the same source" not in done.stderr  # the command above said it


def test_after_an_update_other_rows_are_asked_for(posterior, calibration, capsys):
    say_dropped(posterior.promise(str(calibration), max_share_to_people=0.5), Path("runs/2"))
    told = "bhpeft promise runs/2 LABELLED_ROWS (other rows than these) makes a new one"
    assert told in capsys.readouterr().err


def test_it_is_not_claimed_for_other_predictions(copied, calibration, folder):
    bhpeft("promise", copied, calibration, *HALF, "--device", "cpu")
    new, out = folder / "new.csv", copied.parent / "out.csv"
    said = bhpeft("predict", copied, new, "--out", out, "--seed", 1, "--device", "cpu").stderr
    assert "note: nothing is promised of these" in said and "for people" not in said
    assert read_csv(out)[0]["answered"] == ""


def test_nothing_is_promised_of_strange_texts(copied, calibration, folder):
    bhpeft("promise", copied, calibration, *HALF, "--device", "cpu")
    run = loaded(copied, folder)
    known = Novelty.of(run.model, run.encode(str(calibration)))
    run.replace(novelty=known).save(copied, overwrite=True)
    odd = [" ".join(f"w{38 + (i + k) % 11}" for k in range(9)) for i in range(30)]
    strange = write_csv(copied.parent / "strange.csv", text=odd)
    said = {
        data: bhpeft(
            "predict", copied, data, "--out", copied.parent / f"{data.stem}-out.csv"
        ).stderr
        for data in (strange, calibration)
    }
    assert "0 of 30 answered, for people: 30 (100%) unlike what was learnt, 0 (0%)" in said[strange]
    assert "note: 100% of the rows are unlike what was learnt" in said[strange]
    assert " answered" in said[calibration] and "note:" not in said[calibration]


def test_sets_are_added(copied, calibration, folder):
    new, out = folder / "new.csv", copied.parent / "out.csv"
    predict = ("predict", copied, new, "--out", out, "--coverage", "80%", "--device", "cpu")
    assert "no calibration rows" in error(*predict)
    bhpeft("promise", copied, calibration, *HALF, "--device", "cpu")
    bhpeft(*predict)
    sets = loaded(copied, folder).predict(str(new)).sets(0.8)
    assert [json.loads(row["set_80"]) for row in read_csv(out)] == sets
    before = out.read_bytes()
    assert "coverage=1.0" in error(*predict[:-3], "100%", "--overwrite")
    for more in (("--samples", 5), ("--seed", 1)):  # for which there is no promise
        assert "no calibration rows" in error(*predict, "--overwrite", *more)
    assert out.read_bytes() == before


def test_sets_are_those_of_the_way_that_is_promised(distilled, calibration, folder, tmp_path):
    new, out, run = folder / "new.csv", tmp_path / "out.csv", tmp_path / "run"
    bhpeft("promise", distilled, calibration, *HALF, "--method", "exact", "--out", run)
    said = bhpeft("predict", run, new, "--out", out, "--coverage", "80%").stderr
    assert "exact forecasts" in said and "answered" in said  # by default it is by the student
    sets = loaded(run, folder).predict(str(new), method="exact").sets(0.8)
    assert [json.loads(row["set_80"]) for row in read_csv(out)] == sets


def test_intervals_are_added(tmp_path, folder):
    texts = [f"w{5 + i % 9} w{10 + i % 30} w{40 - i // 9}" for i in range(120)]
    rows = [str(i % 9 / 2) for i in range(120)]
    train, more = (
        write_csv(tmp_path / name, text=texts[part], rating=rows[part])
        for name, part in (("train.csv", slice(60)), ("calibration.csv", slice(60, None)))
    )
    run, out = tmp_path / "run", tmp_path / "out.csv"
    fit = ("fit", train, "--backbone", folder / "tiny", "--out", run, "--preset", "head_only")
    bhpeft(*fit, "--components", 1, "--max-steps", 5, "--device", "cpu")
    assert "tolerance=None: for kind 'rating'" in error("promise", run, more)
    said = bhpeft("promise", run, more, "--tolerance", 1, *HALF).stdout
    assert "more than 1 from the rating" in said
    few = error("predict", run, folder / "new.csv", "--out", out, "--coverage", "99%")
    assert "level=0.99: 60 calibration rows; expected at least 99" in few
    bhpeft("predict", run, folder / "new.csv", "--out", out, "--coverage", "75%")
    ends = loaded(run, folder).predict(str(folder / "new.csv")).intervals(0.75)
    for name, values in zip(("from_75", "to_75"), ends, strict=True):
        found = [float(row[name]) for row in read_csv(out)]
        assert found == pytest.approx(values.tolist(), rel=1e-5)


def test_a_stream_promises_and_history_says_when_it_is_broken(tmp_path, folder):
    first = [i % 2 for i in range(90)]
    names = ["good" if k else "bad" for k in first]
    names[60:] = ["good" if i % 3 else "bad" for i in range(30)]
    texts = [f"w{5 + k} w{7 + i % 3} w{30 + 7 * i % 17}" for i, k in enumerate(first)]
    data = write_csv(tmp_path / "data.csv", text=texts, label=names)
    out = ("--out", tmp_path / "stream")
    stream = ("stream", data, "--batch", 30, "--backbone", folder / "tiny", "--components", 1)
    stream = (*stream, "--preset", "head_only", "--max-steps", 60, "--device", "cpu")
    assert "expected --promise too" in error(*stream, *out, "--error", "5%")
    few = write_csv(tmp_path / "few.csv", text=["w6 w49"] * 3, label=["good"] * 3)
    assert "calibration: 3 rows; expected at least 45" in error(*stream, *out, "--promise", few)
    texts = [f"w{5 + i % 2} w{30 + 7 * i % 17} w{7 + i % 3}" for i in range(90)]  # like the data
    names = ["good" if i % 2 else "bad" for i in range(90)]
    calibration = write_csv(tmp_path / "calibration.csv", text=texts, label=names)
    bhpeft(*stream, *out, "--promise", calibration, "--error", "30%")
    rows = read_csv(tmp_path / "stream" / "record.csv")
    assert rows[0]["promise/answered"] == "" and float(rows[1]["promise/answered"]) > 0
    shown = bhpeft("history", tmp_path / "stream").stdout
    states = ["holds" if row["promise/broken"] == "0.0" else "broken" for row in rows[1:]]
    assert re.findall("holds|broken", shown) == states and "promise" in shown


def test_the_error_is_promised_or_no_row_is_answered(copied, calibration, folder):
    done = bhpeft("promise", copied, calibration, "--error", "1%", "--confidence", "50%")
    assert "at most 1% are wrong" in done.stdout and "answered: none" in done.stdout
    assert "next: label more rows, or give a larger --error, or --max-share" in done.stderr
    told = error("promise", copied, calibration, "--error", "1%")
    assert "100 rows; expected at least 230" in told
    assert "expected one of them" in error("promise", copied, calibration, "--error", "5%", *HALF)
    assert "tolerance=0.5: for kind" in error("promise", copied, calibration, "--tolerance", 0.5)


def test_rows_that_were_learnt_are_refused(copied, folder, tmp_path):
    learnt = write_csv(tmp_path / "learnt.csv", text=TEXTS, label=NAMES)
    told = error("promise", copied, learnt)
    assert re.search(r"20 of 20 rows have the text of a row that was learnt", told)
    assert loaded(copied, folder).promised is None


def test_the_defaults_are_those_of_python() -> None:
    own = inspect.signature(promise).parameters
    python = inspect.signature(bh.Posterior.promise).parameters
    assert own["confidence"].default == f"{python['confidence'].default:.0%}"
    for name in ("error", "tolerance", "max_share_to_people", "method"):
        assert own[name].default == python[name].default is None
