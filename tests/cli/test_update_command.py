"""`bhpeft update`: a second round from a saved one."""

from __future__ import annotations

import json

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
    write_csv,
)

from bhpeft_pyro.forecast import metrics


def test_update_learns_a_second_round_and_leaves_the_first(folder, tmp_path):
    before = {file.name: file.read_bytes() for file in (folder / "run").iterdir()}
    arguments = ("update", folder / "run", folder / "train.csv", "--out", tmp_path / "second")
    arguments = (*arguments, "--again")
    result = bhpeft(*arguments, "--max-steps", 3, "--validation", "20%", "--json")
    assert before == {file.name: file.read_bytes() for file in (folder / "run").iterdir()}
    found = json.loads(result.stdout)
    assert found["round"] == 2 and found["after"].keys() == found["before"].keys()
    change = found["after"]["accuracy"] - found["before"]["accuracy"]
    assert f"since the last round, on these rows: accuracy {change:+.3f} ± " in result.stderr
    first, second = loaded(tmp_path / "second", folder).lineage
    assert (first.steps, second.steps) == (2 * 4, 2 * 3)
    assert first.name == second.name == "train.csv"
    assert second.options.batch_size == 8  # as in the first round
    run = loaded(folder / "run", folder)
    before_scores = metrics.evaluate(
        run.predict(run.encode(folder / "train.csv").hold_out(0, 0.2)[1])
    )
    assert found["before"] == pytest.approx(before_scores)
    assert "--overwrite" in error(*arguments)
    bhpeft(*arguments, "--max-steps", 1, "--overwrite", "--validation", 0)
    assert loaded(tmp_path / "second", folder).report.steps == 2 * 1


def test_an_update_that_may_grow_and_need_not_shows_both_rounds(folder, tmp_path):
    new = write_csv(tmp_path / "new.csv", text=[f"{text} w3" for text in TEXTS], label=NAMES)
    update = ("update", folder / "run", new, *QUICK, *FIFTH, "--grow", "--json")
    found = json.loads(bhpeft(*update, "--out", tmp_path / "same").stdout)
    assert {"before", "after"} <= found.keys()
    write_csv(new, text=TEXTS, label=["strange", "strange", *NAMES[2:]])
    found = json.loads(bhpeft(*update, "--out", tmp_path / "more").stdout)
    assert "held_out" in found and "before" not in found


def test_an_update_without_rows_to_look_at_does_not_inherit_patience(folder, tmp_path):
    first = (*ONE, "--patience", 2, "--temperature", 1, "--validation", "20%")
    first = (*first, "--backbone", folder / "tiny")
    bhpeft("fit", folder / "train.csv", *first, "--out", tmp_path / "first")
    again = ("update", tmp_path / "first", folder / "train.csv", "--again")
    for out, part, patience in (("none", 0, None), ("some", "20%", 2)):
        bhpeft(*again, "--validation", part, "--out", tmp_path / out)
        updated = loaded(tmp_path / out, folder)
        assert updated.report.options.patience == patience
    message = error(*again, "--validation", 0, "--patience", 3, "--out", tmp_path / "asked")
    assert "needs validation" in message


def test_update_forgets_grows_and_refuses_what_it_knows(folder, tmp_path):
    quick = ("--max-steps", 3, "--validation", 0, "--overwrite", "--out", tmp_path / "next")
    texts = [f"w{9 + i} w40" for i in range(8)]
    alone = write_csv(tmp_path / "alone.csv", text=texts, label=["strange"] * 8)
    told = bhpeft("update", folder / "run", alone, *quick, "--grow").stderr
    assert "note: data: all rows have labels that are new" in told
    old = loaded(folder / "run", folder).columns.label_names[0]
    new = write_csv(tmp_path / "new.csv", text=texts, label=["strange"] * 7 + [old])
    assert "strange" in error("update", folder / "run", new, *quick)  # no such label yet
    shown = bhpeft("update", folder / "run", new, *quick, "--grow", "--keep", 0.5)
    assert "new classes: strange\n" in shown.stderr
    grown = loaded(tmp_path / "next", folder)
    assert grown.columns.label_names[-1] == "strange" and grown.model.network.outputs == 3
    assert grown.report.keep == 0.5
    assert "again=True" in error("update", tmp_path / "next", new, *quick)
    for more in (("--seed", 1), ("--validation", 0), ("--validation", "30%")):  # other rows of it
        same = ("update", folder / "run", folder / "train.csv", "--out", tmp_path / "no", *more)
        assert "has learnt 20 of these examples already" in error(*same)
    bhpeft("update", tmp_path / "next", new, *quick, "--again")
    last = loaded(tmp_path / "next", folder)
    assert len(last.lineage) == 3
