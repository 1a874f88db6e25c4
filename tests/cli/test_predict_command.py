"""`bhpeft predict`: what is written and said of a file, and which files are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from program import (
    NAMES,
    TEXTS,
    bhpeft,
    error,
    loaded,
    read_csv,
    read_lines,
    usage_error,
    write_csv,
    write_lines,
)

import bhpeft_pyro as bh
from bhpeft_pyro.data import table
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast.base import way_in_words
from bhpeft_pyro.prediction.predict import PART

ROWS = [f"w{5 + i % 2} w{10 + i}" + " w9" * (i % 5) for i in range(11)]


def test_two_commands_from_a_csv_to_flagged_predictions(folder, posterior, tmp_path):
    out = tmp_path / "out.csv"
    result = bhpeft("predict", folder / "run", folder / "new.csv", "--flag", "40%", "--out", out)
    rows = read_csv(out)
    forecast = posterior.predict(str(folder / "new.csv"))
    assert list(rows[0]) == [
        *("id", "text", "prediction", "probability", "epistemic", "aleatoric"),
        *("novelty", "reason", "answered", "flagged"),
    ]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["prediction"] for row in rows] == [["bad", "good"][k] for k in forecast.label]
    for name, values in (
        ("probability", forecast.confidence),
        ("epistemic", forecast.epistemic),
        ("aleatoric", forecast.aleatoric),
        ("novelty", forecast.novelty),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-6)
    flagged = [i for i, row in enumerate(rows) if row["flagged"] == "True"]
    assert flagged == sorted(forecast.flag(0.4).tolist()) and len(flagged) == 2
    assert [row["reason"] or None for row in rows] == forecast.reasons()
    # Two components, each with a forward pass and, of two classes, one backward pass; and novelty.
    how = "2 flagged (the least certain by total uncertainty); exact forecasts, 5 passes a text"
    assert f"5 rows, {how}; written to {out}" in result.stderr
    shown = [int(n) for n in re.findall(r"^\s+(\d)\s", result.stdout, re.MULTILINE)]
    assert [row - 2 for row in shown] == forecast.flag(1.0).tolist()  # the header is row 1


@pytest.mark.parametrize("by", ["total", "novelty"])
def test_the_text_has_room_in_a_narrow_window(run, tmp_path, by, monkeypatch):
    text = "w5 w9 w7 w8 w6 w10 w11 w12 w13"
    data, out = write_csv(tmp_path / "new.csv", text=[text] * 99), tmp_path / "out.csv"
    command = ("predict", run, data, "--by", by, "--out", out, "--overwrite")
    for width, all_shown in ((80, False), (120, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = bhpeft(*command).stdout
        assert text[:29] in shown and "prediction " in shown
        assert ("novelty" in shown) == (all_shown or by == "novelty")
        assert ("reason" in shown) == (all_shown or by == "total")


def test_the_way_to_predict_is_chosen_and_told(folder, distilled, tmp_path):
    whole = loaded(distilled, folder)
    data, out = folder / "new.csv", tmp_path / "out.csv"
    for options, cost, how in (
        ((), "forecasts by the student, 2 passes a text", {}),
        (("--method", "exact"), "exact forecasts, 5 passes a text", {"method": "exact"}),
        (("--samples", 8), "exact forecasts, 5 passes a text", {"samples": 8}),
        (("--samples", 0), "forecasts by the mean weights, 3 passes a text", {"samples": 0}),
    ):
        said = bhpeft("predict", distilled, data, *options, "--out", out, "--overwrite").stderr
        assert f"by total uncertainty); {cost}; " in said, options
        forecast = whole.predict(str(data), **how)
        assert cost == way_in_words(forecast.method, forecast.passes), options
        found = [float(row["epistemic"]) for row in read_csv(out)]
        assert found == pytest.approx(forecast.epistemic.tolist(), rel=1e-5, abs=1e-7), options


def test_a_way_that_is_not_there_is_refused(folder, distilled, tmp_path):
    data, out = folder / "new.csv", ("--out", tmp_path / "out.csv")
    for run, options, message in (
        ("run", ("--method", "student"), "no student"),
        (distilled, ("--method", "student", "--samples", 3), "expected no samples=3"),
        ("run", ("--method", "exact", "--samples", 0), "method='exact': samples=0"),
    ):
        assert re.search(message, error("predict", folder / run, data, *options, *out)), options
    assert "'best' is not one of" in usage_error("predict", distilled, data, "--method", "best")
    assert not (tmp_path / "out.csv").exists()


def test_columns_of_mixed_types_are_in_nobodys_way(folder, posterior, tmp_path):
    """Neither those that no command reads, nor labels that are not looked at."""
    rows = [
        {"id": i or "first", "text": text, "label": name}
        for i, (text, name) in enumerate(zip(TEXTS, NAMES, strict=True))
    ]
    data = write_lines(tmp_path / "mixed.jsonl", rows)
    half = write_lines(tmp_path / "half.jsonl", [row | {"label": row["id"]} for row in rows])
    scores = json.loads(bhpeft("evaluate", folder / "run", folder / "train.csv", "--json").stdout)
    assert json.loads(bhpeft("evaluate", folder / "run", data, "--json").stdout) == scores
    whole = posterior.encode(folder / "train.csv")
    assert posterior.encode(str(data)).fingerprint == whole.fingerprint
    bhpeft("predict", folder / "run", half, "--out", tmp_path / "out.jsonl", "--show", 0)
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["label"] for row in found] == ["first", *range(1, 20)]
    assert "half.jsonl, column 'label', line 1: 'first' is not one of" in error(
        "evaluate", folder / "run", half
    )


def test_the_cells_of_a_file_are_written_as_they_were(folder, tmp_path):
    version, price, text = ["1.10", "1.9"], ["5.00", "0.12345678901234567890"], ["w5\rw6", "12"]
    data = write_csv(tmp_path / "new.csv", version=version, price=price, text=text)
    bhpeft("predict", folder / "run", data, "--show", 0)
    found = read_csv(tmp_path / "new-predictions.csv")
    assert [row["version"] for row in found] == version
    assert [row["price"] for row in found] == price
    assert [row["text"] for row in found] == text  # a bare carriage return ends no row
    days = ["2024-03-01", "2024-03-02"]
    lines = write_lines(tmp_path / "new.jsonl", [{"text": "w5", "day": day} for day in days])
    bhpeft("predict", folder / "run", lines, "--show", 0)
    assert [row["day"] for row in read_lines(tmp_path / "new-predictions.jsonl")] == days
    lines.write_text('{"text": "w5", "note": "half \\ud83d"}\n')  # of an emoji
    bhpeft("predict", folder / "run", lines, "--show", 0, "--overwrite")
    (written,) = read_lines(tmp_path / "new-predictions.jsonl")
    assert written["note"] == "half \ud83d"


def test_no_cell_is_a_formula_and_a_file_comes_back_as_it_was(folder, tmp_path):
    """A spreadsheet would run `=HYPERLINK(...)`; the next command reads what was meant."""
    rows = ["=w5 w9", "+w6", "-w7 w8", "@w33 w5", "\tw5", "-inf", "'w5"]
    prices = ["-1.5", "+2", "-3", "-4", "5", "6", "7"]
    write_csv(tmp_path / "new.csv", **{"text": rows, "=price": prices})
    bhpeft("predict", folder / "run", tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    found = read_csv(tmp_path / "out.csv")
    assert [row["text"] for row in found] == [f"'{text}" for text in rows[:-1]] + ["'w5"]
    assert [row["'=price"] for row in found] == prices  # numbers stay numbers
    bhpeft("predict", folder / "run", tmp_path / "out.csv", "--out", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()
    given, predicted = (table(tmp_path / name) for name in ("new.csv", "out.csv"))
    assert predicted[[*given]].equals(given)


def test_predictions_are_not_replaced_unless_told(folder, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    predict = ("predict", folder / "run", folder / "new.csv", "--out", out)
    assert "--overwrite" in error(*predict) and out.read_text() == "mine"
    bhpeft(*predict, "--overwrite")
    assert len(read_csv(out)) == 5


def test_a_file_whose_text_has_another_name(folder, posterior, tmp_path):
    data = write_csv(tmp_path / "new.csv", review=["w5 w9", "w6 w9"], text=["w6", "w6"])
    out = tmp_path / "out.jsonl"
    bhpeft("predict", folder / "run", data, "--text-column", "review", "--out", out, "--show", 0)
    found = read_lines(out)
    expected = posterior.predict(["w5 w9", "w6 w9"])
    assert [row["probability"] for row in found] == pytest.approx(expected.confidence.tolist())
    assert [row["text"] for row in found] == ["w6", "w6"]
    again = ("predict", folder / "run", data, "--text-column", "no", "--out", tmp_path / "x.csv")
    assert "column 'no' is missing; columns there: " in error(*again)


def test_blank_lines_are_rows_and_may_be_skipped(folder, tmp_path):
    """One column of a spreadsheet, with empty cells; those at the end are none."""
    data = tmp_path / "new.csv"
    data.write_text("text\nw5 w9\n\n  \nw6 w9\n\n\n")
    command = ("predict", folder / "run", data, "--show", 9)
    told = error(*command)
    assert "new.csv, column 'text', row 3: the text is missing" in told
    assert told.endswith("(and 1 more: row 4); or give --skip-bad")
    result = bhpeft(*command, "--skip-bad")
    told = "note: 2 rows have no prediction: new.csv, row 3: the text is missing (and 1 more"
    assert told in result.stderr
    rows = read_csv(tmp_path / "new-predictions.csv")
    assert [row["text"].strip() for row in rows] == ["w5 w9", "", "", "w6 w9"]
    assert [row["prediction"] != "" for row in rows] == [True, False, False, True]
    shown = re.findall(r"^\s+(\d+)\s", result.stdout, re.MULTILINE)
    assert sorted(shown) == ["2", "5"]


def test_predictions_have_the_labels_and_their_probabilities(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    result = bhpeft("predict", labels / "run", labels / "train.csv", "--out", out)
    assert "{" not in result.stdout  # probabilities by label are in the file alone
    rows = read_csv(out)
    assert len(rows) == 12
    for row in rows:
        probability = json.loads(row["probability"])
        assert [*probability] == ["art", "sport"]
        above = [name for name, p in probability.items() if p > 0.5]
        assert json.loads(row["prediction"]) == above
        assert float(row["epistemic"]) >= 0
    assert sum(row["flagged"] == "True" for row in rows) == 2
    wrong = error("predict", labels / "run", labels / "train.csv", "--by", "confidence",
                  "--out", tmp_path / "no.csv")  # fmt: skip
    assert "by='confidence' must be one of" in wrong and not (tmp_path / "no.csv").exists()


def read(out: Path) -> tuple[list[Any], list[float]]:
    """The rows of a file, and their numbers apart from them."""
    if out.suffix == ".csv":
        rows: list[Any] = read_csv(out)
    else:
        rows = read_lines(out)
    names = ("probability", "epistemic", "aleatoric")
    return rows, [float(row.pop(name)) for row in rows for name in names]


def test_columns_of_each_kind_of_file_stay(run: Path, tmp_path: Path) -> None:
    notes = [None if i % 3 else f"a\r{i}" for i in range(11)]
    sources: dict[str, list[Any]] = {"id": list(range(11)), "text": ROWS, "note": notes}
    own = {"flagged": "by us", "reason": "late parcel"}
    sources |= {name: [cell] * 11 for name, cell in own.items()}
    write_csv(tmp_path / "new.csv", **sources)
    rows = [dict(zip(sources, row, strict=True)) for row in zip(*sources.values(), strict=True)]
    rows[9]["late"] = [1, 2]  # a column that earlier rows lack
    write_lines(tmp_path / "new.jsonl", rows)
    write_lines(tmp_path / "new.json", rows)
    found = {}
    for name, suffix, header in (
        ("new.csv", "csv", 1),
        ("new.jsonl", "jsonl", 0),
        ("new.json", "csv", 0),
    ):
        out = tmp_path / f"{name}.{suffix}"
        result = bhpeft("predict", run, tmp_path / name, "--flag", "30%", "--out", out)
        assert "11 rows, 4 flagged" in result.stderr
        note = f"{name} has its own reason, flagged; these are written as predicted_"
        assert note in result.stderr
        shown = re.findall(r"^\s+(\d+)\s", result.stdout, re.MULTILINE)
        written, numbers = read(out)
        found[name] = [int(row) - header for row in shown], numbers
        assert [str(row["id"]) for row in written] == [*map(str, range(11))]
        assert [row["note"] or None for row in written] == notes
        assert all(row.items() >= own.items() for row in written)
        assert [str(row["predicted_flagged"]) for row in written].count("True") == 4
    assert found["new.csv"] == found["new.jsonl"] == found["new.json"]
    lines = read_lines(tmp_path / "new.jsonl.jsonl")
    assert [row["late"] for row in lines] == [None] * 9 + [[1, 2], None]
    assert json.loads(read_csv(tmp_path / "new.json.csv")[9]["late"]) == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_column_of_an_earlier_prediction_stays(run: Path, tmp_path: Path) -> None:
    """What was promised then may not be promised now."""
    old = {"prediction": ["bad"] * 11, "answered": ["True"] * 11, "set_90": ["[]"] * 11}
    old |= {"from_95": [1] * 11, "sd": [0.5] * 11, "epistemic": [0.1] * 11}
    old |= {"flagged": ["True"] * 11}
    write_csv(tmp_path / "again.csv", text=ROWS, sdk=["own"] * 11, **old)
    bhpeft("predict", run, tmp_path / "again.csv", "--out", tmp_path / "out.csv")
    (first, *_) = read_csv(tmp_path / "out.csv")
    assert first["sdk"] == "own" and not {"set_90", "from_95", "sd"} & first.keys()
    assert first["answered"] == ""
    assert first["flagged"] and first["prediction"]


def test_an_earlier_prediction_is_replaced_beside_the_tables_own_columns(
    run: Path, tmp_path: Path
) -> None:
    """The columns reason, nearest and probability of a team were written over."""
    own = {"reason": ["late parcel"] * 5, "nearest": ["Leeds"] * 5, "probability": ["low"] * 5}
    data = write_csv(tmp_path / "new.csv", text=ROWS[:5], **own)
    out, again = tmp_path / "out.csv", tmp_path / "again.csv"
    bhpeft("predict", run, data, "--out", out)
    rows = read_csv(out)
    assert [{name: row[name] for name in own} for row in rows] == [
        {name: cells[0] for name, cells in own.items()}
    ] * 5
    assert {"predicted_reason", "predicted_probability"} <= rows[0].keys()
    bhpeft("predict", run, out, "--out", again)
    assert read_csv(again) == rows


def test_texts_and_labels_keep_their_columns_whatever_these_are_called(
    head_only: tuple[object, ...], tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", reason=TEXTS, prediction=NAMES)
    columns = ("--text-column", "reason", "--label-column", "prediction")
    bhpeft("fit", train, *head_only, *columns, "--out", tmp_path / "run")
    out, again = tmp_path / "out.csv", tmp_path / "again.csv"
    bhpeft("predict", tmp_path / "run", train, "--out", out)
    rows = read_csv(out)
    assert [row["reason"] for row in rows] == TEXTS
    assert [row["prediction"] for row in rows] == NAMES
    assert {row["predicted_prediction"] for row in rows} <= {"bad", "good"}
    assert all(row["predicted_reason"] for row in rows)
    earlier = {name: [row[name] for row in rows] for name in rows[0]} | {"answered": ["x"] * 20}
    write_csv(out, **earlier)
    bhpeft("predict", tmp_path / "run", out, "--out", again)
    assert read_csv(again) == rows  # of an earlier prediction nothing stays


def test_rows_are_checked_before_the_first_is_predicted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bh.Posterior, "predict", lambda *_, **__: 1 / 0)
    data = write_csv(tmp_path / "new.csv", text=[*ROWS[:9], "", "w5"])
    assert "new.csv, column 'text', row 11: the text is missing" in error("predict", run, data)
    lines = write_lines(tmp_path / "new.jsonl", [{"text": text} for text in ROWS])
    with lines.open("a") as file:
        file.write("{")
    assert "line 12 is not JSON" in error("predict", run, lines)
    lines.write_text('{"text": "w5"}\n' * 4 + '{"words": "w5"}\n' * 4)
    assert "new.jsonl, column 'text', line 5: the text is missing" in error("predict", run, lines)
    lines.write_text('{"words": "w5"}\n' * 8)
    assert "column 'text' is missing; columns there: words" in error("predict", run, lines)
    (tmp_path / "none.csv").write_text("text\n")
    assert "none.csv: there are no rows" in error("predict", run, tmp_path / "none.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "new.jsonl", "none.csv"}


@pytest.fixture
def refuses_w33(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts with w33 cannot be predicted, as if the backbone's output were not finite."""
    whole = bh.Posterior.predict

    def predict(self: Any, examples: Any, *args: Any, **options: Any) -> Any:
        if bad := [i for i, text in enumerate(examples.texts) if "w33" in text]:
            raise DataError.of_rows("data", bad, f"{examples.texts[bad[0]]} is bad")
        return whole(self, examples, *args, **options)

    monkeypatch.setattr(bh.Posterior, "predict", predict)


@pytest.mark.usefixtures("refuses_w33")
def test_texts_that_are_cut_are_counted_once(run: Path, tmp_path: Path) -> None:
    """Though they are read again without a row that cannot be predicted."""
    texts = ["w9 " * 40, "w33", "w6", "w9 " * 50, "w9 " * 60]
    data = write_csv(tmp_path / "long.csv", text=texts)
    said = bhpeft("predict", run, data, "--skip-bad").stderr
    cut = [line for line in said.splitlines() if "were cut" in line]
    assert cut == ["note: 3 of 5 texts are longer than 32 tokens and were cut"]


def test_a_length_that_was_asked_for_is_said_when_texts_are_learnt(
    head_only: tuple[object, ...], tmp_path: Path
) -> None:
    data, more = (
        write_csv(tmp_path / name, text=[f"{word} {text} w9 w9 w9" for text in TEXTS], label=NAMES)
        for name, word in (("train.csv", "w7"), ("more.csv", "w8"))
    )
    run, out = tmp_path / "run", ("--out", tmp_path / "out")
    fit = ("fit", data, *head_only, "--max-length", 4, "--out", run)
    for command, told in (
        (fit, True),
        (("predict", run, more, "--out", tmp_path / "out.csv"), False),
        (("evaluate", run, more), False),
        (("update", run, more, *out), True),
    ):
        assert ("were cut" in bhpeft(*command).stderr) == told, command[0]


@pytest.mark.usefixtures("refuses_w33")
def test_rows_left_out_are_named_and_the_others_stay_in_place(run: Path, tmp_path: Path) -> None:
    texts = [*ROWS[:3], "w33 w5", "", *["w33"] * 3, *ROWS[3:5]]
    data = write_csv(tmp_path / "new.csv", id=range(10), text=texts)
    command = ("predict", run, data, "--flag", "100%")
    assert "error: new.csv, column 'text', row 6: the text is missing" in error(*command)
    result = bhpeft(*command, "--skip-bad")
    note = "5 rows have no prediction: new.csv, row 5: w33 w5 is bad (and 4 more: rows 6, 7, 8, 9)"
    assert note in result.stderr
    rows = read_csv(tmp_path / "new-predictions.csv")
    flagged = ["True"] * 3 + [""] * 5 + ["True"] * 2
    assert [row["flagged"] for row in rows] == flagged and [row["text"] for row in rows] == texts
    assert [row["prediction"] != "" for row in rows] == [flag == "True" for flag in flagged]
    shown = re.findall(r"^\s+(\d+)\s", result.stdout, re.MULTILINE)
    assert sorted(map(int, shown)) == [2, 3, 4, 10, 11]  # as a spreadsheet counts
    assert "rows as in new.csv" in result.stdout
    data = write_csv(tmp_path / "bad.csv", text=["w33"] * 8)
    told = error("predict", run, data)
    assert "error: bad.csv, row 2: w33 is bad" in told and told.endswith("; or give --skip-bad")
    assert "(and 7 more: rows 3, 4, 5, 6, 7 ...)" in error("predict", run, data, "--skip-bad")
    assert not (tmp_path / "bad-predictions.csv").exists()


def test_texts_are_kept_and_numbers_skipped_wherever_the_first_is(
    run: Path, tmp_path: Path
) -> None:
    texts: list[Any] = [7, "w5 w9", 8, 9, None, "w6 w9", "w7", "w8"]
    data = write_lines(tmp_path / "new.jsonl", ({"text": text, "id": 0} for text in texts))
    why = "line 1: 7 is a int; expected a str"
    told = error("predict", run, data)
    assert f"new.jsonl, column 'text', {why}" in told and told.endswith("; or give --skip-bad")
    result = bhpeft("predict", run, data, "--skip-bad", "--show", 0)
    assert f"note: 4 rows have no prediction: new.jsonl, {why}" in result.stderr
    rows = read_lines(tmp_path / "new-predictions.jsonl")
    assert [bool(row.get("prediction")) for row in rows] == [type(text) is str for text in texts]


def test_many_lines_in_a_row_may_lack_the_text(run: Path, tmp_path: Path) -> None:
    """All that would be predicted together, wherever the first of these is."""
    count = 2 * PART
    rows = [{"text": "w5 w9"}, *({"id": i} for i in range(count)), {"text": "w6 w9"}]
    data = write_lines(tmp_path / "new.jsonl", rows)
    said = bhpeft("predict", run, data, "--skip-bad", "--show", 0).stderr
    assert f"note: {count} rows have no prediction: new.jsonl, line 2: the text is" in said
    found = read_lines(tmp_path / "new-predictions.jsonl")
    assert [i for i, row in enumerate(found) if row["prediction"]] == [0, count + 1]


def test_rows_unlike_what_was_learnt_are_flagged(folder, posterior, tmp_path):
    data, out = folder / "new.csv", tmp_path / "out.csv"
    p = posterior.predict(str(data)).novelty
    level = sorted(p.tolist())[2]  # which three rows have, or less
    expected = (p <= level).tolist()
    said = bhpeft("predict", folder / "run", data, "--max-false-alarms", level, "--out", out)
    rows = read_csv(out)
    assert [row["flagged"] == "True" for row in rows] == expected and sum(expected) < 5
    most = f"of rows like the learnt ones at most {level:.4g}"
    assert f"flagged (the most unlike what was learnt: {most})" in said.stderr
    shown = " ".join(said.output.split())
    assert "The most unlike what was learnt first; rows as in" in shown
    bhpeft("predict", folder / "run", data, "--by", "novelty", "--out", out, "--overwrite")
    (flagged,) = (i for i, row in enumerate(read_csv(out)) if row["flagged"] == "True")
    assert p[flagged] == p.min()
    for options, message in (
        (("--max-false-alarms", 0), "--max-false-alarms: 0 flags no row"),
        (("--max-false-alarms", "5%", "--flag", "5%"), "takes the place of --flag"),
        (("--max-false-alarms", "5%", "--by", "epistemic"), "takes the place of --by"),
        (("--max-false-alarms", "1%"), "0.01 needs 99 learnt texts, of which there are 20"),
    ):
        wrong = error("predict", folder / "run", data, *options, "--out", out, "--overwrite")
        assert message in " ".join(wrong.split()), options


def test_the_nearest_learnt_text_is_a_column_where_texts_are_kept(folder, posterior, tmp_path):
    texts = [*map(str, ROWS), *(f"w{k} w{k + 5} w8" for k in range(10, 22))]
    labels = [i % 2 for i in range(len(texts))]
    data = write_csv(tmp_path / "train.csv", text=texts, label=labels)
    run, out = tmp_path / "run", tmp_path / "out.csv"
    options = ("--keep-texts", "--max-steps", 1, "--components", 1, "--preset", "lora")
    said = bhpeft("fit", data, "--out", run, "--backbone", folder / "tiny", *options)
    assert f"texts: {len(texts)} learnt ones are kept here, and in files" in said.output
    bhpeft("predict", run, data, "--out", out)
    rows = read_csv(out)
    assert [row["nearest"] for row in rows] == [row["text"] for row in rows] == texts


def test_without_novelty_none_is_flagged_by_it(folder, posterior, tmp_path):
    posterior.replace(novelty=None).save(tmp_path / "run")
    out, backbone = ("--out", tmp_path / "out.csv"), ("--backbone", folder / "tiny")
    command = ("predict", tmp_path / "run", folder / "new.csv", *out, *backbone)
    assert "of an earlier version" in " ".join(error(*command, "--max-false-alarms", "5%").split())
    bhpeft(*command)
    assert "novelty" not in read_csv(out[1])[0] and read_csv(out[1])[0]["reason"]
