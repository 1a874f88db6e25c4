"""`bhpeft queue`: texts to label, in a file that `update` reads."""

from __future__ import annotations

from datetime import date
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset
from program import (
    NAMES,
    TEXTS,
    bhpeft,
    error,
    loaded,
    read_csv,
    read_lines,
    write_csv,
    write_lines,
)

CPU = ("--device", "cpu")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Texts with a number that must stay as it is; of the first five, four have been learnt or are
    copies."""
    new = ["w30 w31", "W30  w31", *(f"w{i} w{i + 1} w9" for i in range(12, 40))]
    texts = [*TEXTS[:3], *new]
    return write_csv(tmp_path / "pool.csv", id=[f"0{i}" for i in range(len(texts))], text=texts)


def test_from_a_queue_to_the_next_round(run, folder, pool, tmp_path):
    out = tmp_path / "queue.csv"
    said = bhpeft("queue", run, pool, "--n", 4, "--out", out, *CPU).stderr
    assert "4 of 33 texts, by information; left out: 3 learnt, 1 copies" in said
    assert f"bhpeft update {run} {out} --out RUN" in said
    rows = read_csv(out)
    assert list(rows[0]) == ["id", "text", "label", "reason"]
    posterior = loaded(run, folder)
    given = [row["text"] for row in read_csv(pool)]
    queue = posterior.queue(given, 4)
    assert [(row["text"], row["reason"]) for row in rows] == [
        (given[i], reason) for i, reason in zip(queue.rows.tolist(), queue.reasons, strict=True)
    ]
    assert [row["id"] for row in rows] == [f"0{i}" for i in queue.rows.tolist()]
    assert all(row["label"] == "" for row in rows)
    assert "label" in error("update", run, out, "--out", tmp_path / "next", *CPU)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    write_csv(out, **columns | {"label": NAMES[:4]})
    bhpeft("update", run, out, "--out", tmp_path / "next", "--max-steps", 2, *CPU)
    after = bhpeft("queue", tmp_path / "next", pool, "--n", 50, "--out", tmp_path / "2.csv", *CPU)
    assert "25 of 33 texts, by information; left out: 7 learnt, 1 copies" in after.stderr


def test_a_column_of_another_name_on_the_way_to_the_next_round(run, pool, tmp_path):
    body = write_csv(tmp_path / "body.csv", body=[row["text"] for row in read_csv(pool)])
    out, named = tmp_path / "queue.csv", ("--text-column", "body")
    said = bhpeft("queue", run, body, "--n", 4, "--out", out, *named, *CPU).stderr
    assert f"bhpeft update {run} {out} --out RUN --text-column body" in said
    rows = read_csv(out)
    write_csv(out, **{k: [row[k] for row in rows] for k in rows[0]} | {"label": NAMES[:4]})
    quick = ("--out", tmp_path / "next", "--max-steps", 2, *CPU)
    bhpeft("update", run, out, *named, *quick)
    bhpeft("evaluate", tmp_path / "next", out, *named, *CPU)
    assert "column 'text' is missing" in error("evaluate", tmp_path / "next", out, *CPU)


def test_before_the_first_fit(folder, pool, tmp_path):
    out = tmp_path / "first.jsonl"
    write_lines(tmp_path / "pool.jsonl", ({"body": row["text"]} for row in read_csv(pool)))
    start = ("queue", folder / "tiny", tmp_path / "pool.jsonl", "--out", out, *CPU)
    assert "column 'text' is missing" in error(*start)
    said = bhpeft(*start, "--text-column", "body", "--n", 3).stderr
    assert "3 of 33 texts, by typical; left out: 0 learnt, 1 copies" in said
    assert f"bhpeft fit {out} --backbone {folder / 'tiny'} --out RUN --text-column body" in said
    rows = read_lines(out)
    assert [*rows[0]] == ["body", "label", "reason"]
    assert "typical of" in rows[0]["reason"]
    assert "exists already" in error(*start, "--text-column", "body")
    again = ("--text-column", "body", "--overwrite", "--by", "random")
    assert "20 of 33 texts, by random" in bhpeft(*start, *again).stderr


def test_the_columns_of_the_data_stay_and_the_label_is_empty(run, pool, tmp_path):
    texts, out = [row["text"] for row in read_csv(pool)], tmp_path / "queue.csv"
    given = {"reason": texts, "label": ["old"] * len(texts), "queue_reason": range(len(texts))}
    data = write_csv(tmp_path / "data.csv", **given)
    bhpeft("queue", run, data, "--text-column", "reason", "--n", 2, "--out", out, *CPU)
    found = read_csv(out)
    assert [*found[0]] == ["reason", "label", "queue_reason", "queue_queue_reason"]
    for row in found:
        assert row["reason"] == texts[int(row["queue_reason"])] and row["label"] == ""
        assert row["queue_queue_reason"]


def test_dates_of_a_data_set_of_the_hub_are_written(run, tmp_path, monkeypatch):
    days = [date(2024, 3, 1 + i) for i in range(3)]
    columns = {"text": ["w30 w31", "w32 w33", "w34 w35"], "day": days, "days": [days] * 3}
    monkeypatch.setattr(
        import_module("bhpeft_pyro.data.table"),
        "load_dataset",
        lambda *_, **__: Dataset.from_dict(columns),
    )
    for name, read in (("queue.csv", read_csv), ("queue.jsonl", read_lines)):
        bhpeft("queue", run, "owner/name", "--out", tmp_path / name, *CPU)
        found = read(tmp_path / name)
        assert sorted(row["day"] for row in found) == [str(day) for day in days]
        assert all("2024-03-02" in row["days"] for row in found)


def test_what_is_refused(run, folder, pool, tmp_path):
    assert "--out" in error("queue", run, pool, "--out", tmp_path / "queue.txt")
    assert "is the data" in error("queue", run, pool, "--out", pool)
    wrong = error("queue", tmp_path / "rn", pool, "--out", tmp_path / "q.csv", *CPU)
    assert "is neither the folder of a posterior nor a backbone" in wrong
    table = error("queue", folder / "train.csv", pool, "--out", tmp_path / "q.csv", *CPU)
    assert table.startswith("error: run: ") and "neither the folder of a posterior nor" in table
    for command in (("queue", run, pool), ("predict", run, pool), ("report", run)):
        place = tmp_path / ("f.html" if command[0] == "report" else "f.csv")
        place.mkdir(exist_ok=True)
        told = error(*command, "--backbone", tmp_path / "none", "--out", place)
        assert f"--out: {place} is a folder; expected a file" in told
    twice = error("queue", folder / "tiny", pool, "--backbone", "tiny", "--out", tmp_path / "q.csv")
    assert "--backbone: " in twice and "is one already; expected no other" in twice
    needs = error("queue", "tiny", pool, "--by", "information", "--out", tmp_path / "q.csv", *CPU)
    assert "tiny" in needs
