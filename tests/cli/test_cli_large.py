"""`bhpeft predict` of more rows than are held at once."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from program import bhpeft, error, read_csv, write_csv
from saves import backbone_in

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.prediction import predict as module

TEXTS = [f"w{5 + i % 2} w{10 + i}" + " w9" * (i % 5) for i in range(11)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    backbone_in(root / "tiny")
    write_csv(root / "train.csv", text=TEXTS, label=["bad", "good"] * 5 + ["bad"])
    fit = ("fit", root / "train.csv", "--backbone", root / "tiny", "--components", 1)
    bhpeft(*fit, "--max-steps", 2, "--device", "cpu", "--out", root / "run")
    return root / "run"


def read(out: Path) -> tuple[list[Any], list[float]]:
    """The rows of a file, and their numbers apart from them."""
    if out.suffix == ".csv":
        rows: list[Any] = read_csv(out)
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ("probability", "epistemic", "aleatoric")
    return rows, [float(row.pop(name)) for row in rows for name in names]


def test_parts_are_written_as_one_piece(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = [None if i % 3 else f"a\r{i}" for i in range(11)]
    sources: dict[str, list[Any]] = {"id": list(range(11)), "text": TEXTS, "note": notes}
    write_csv(tmp_path / "new.csv", **sources)
    rows = [dict(zip(sources, row, strict=True)) for row in zip(*sources.values(), strict=True)]
    rows[9]["late"] = [1, 2]  # a column that earlier parts lack
    for name in ("new.jsonl", "new.json"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, suffix in (("new.csv", "csv"), ("new.jsonl", "jsonl"), ("new.json", "csv")):
        found = []
        for part in (module.PART, 4):
            monkeypatch.setattr(module, "PART", part)
            out = tmp_path / f"{name}.{suffix}"
            command = ("predict", run, tmp_path / name, "--flag", "30%", "--out", out)
            result = bhpeft(*command, "--overwrite")
            assert "11 rows, 4 flagged" in result.stderr
            shown = re.findall(r"^\s+(\d+)\s", result.stdout, re.MULTILINE)
            found.append((shown, *read(out)))
        assert found[0][:2] == found[1][:2]
        assert found[0][2] == pytest.approx(found[1][2], rel=1e-3)
    found = [json.loads(line) for line in (tmp_path / "new.jsonl.jsonl").read_text().splitlines()]
    assert [row["late"] for row in found] == [None] * 9 + [[1, 2], None]
    assert [row["flagged"] for row in found].count(True) == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_are_checked_before_the_first_is_predicted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 4)
    monkeypatch.setattr(bh.Posterior, "predict", lambda *_, **__: 1 / 0)
    data = write_csv(tmp_path / "new.csv", text=[*TEXTS[:9], "", "w5"])
    assert "new.csv, column 'text', row 11: the text is missing" in error("predict", run, data)
    lines = tmp_path / "new.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{")
    assert "line 12 is not JSON" in error("predict", run, lines)
    lines.write_text('{"text": "w5"}\n' * 4 + '{"words": "w5"}\n' * 4)
    assert "new.jsonl, column 'text', line 5: the text is missing" in error("predict", run, lines)
    lines.write_text('{"words": "w5"}\n' * 8)
    assert "has no column 'text', which this posterior" in error("predict", run, lines)
    (tmp_path / "none.csv").write_text("text\n")
    assert "none.csv' is empty" in error("predict", run, tmp_path / "none.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "new.jsonl", "none.csv"}


def test_texts_that_are_cut_are_counted_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 2)
    data = write_csv(tmp_path / "long.csv", text=["w9 " * 40, "w5", "w6", "w9 " * 50, "w9 " * 60])
    notes = [line for line in bhpeft("predict", run, data).stderr.splitlines() if "note" in line]
    assert notes == ["note: 3 of 5 texts are longer than 32 tokens and were cut"]


def test_rows_left_out_are_counted_from_the_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 4)
    whole = bh.Posterior.predict

    def predict(self: Any, examples: Any, *args: Any, **options: Any) -> Any:
        if bad := [i for i, text in enumerate(examples.texts) if "w33" in text]:
            raise DataError.of_rows("data", bad, f"{examples.texts[bad[0]]} is bad")
        return whole(self, examples, *args, **options)

    monkeypatch.setattr(bh.Posterior, "predict", predict)
    # The second part has no other rows, and the third is in order.
    texts = [*TEXTS[:3], "w33 w5", *["w33"] * 4, *TEXTS[3:5]]
    command = ("predict", run, write_csv(tmp_path / "new.csv", text=texts), "--flag", "100%")
    assert "error: new.csv, row 5: w33 w5 is bad" in error(*command)
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
    listed = "(and 7 more: rows 3, 4, 5, 6, 7 ...)"
    assert listed in error("predict", run, data, "--skip-bad")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 16)
    peaks = []
    for count in (48, 48, 192):  # what the first call imports is not counted
        data = tmp_path / f"{len(peaks)}.jsonl"
        rows = ({"text": f"w5 w{i % 40 + 5} {'x' * 5000}"} for i in range(count))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tracemalloc.start()
        bhpeft("predict", run, data, "--samples", 4, "--device", "cpu")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]  # the texts of 144 more rows are 0.7 MB, of some 1.5
