"""`bhpeft history`: rounds with their parents and how good they were."""

from __future__ import annotations

import json

from program import FIFTH, NAMES, ONE, TEXTS, bhpeft, error, loaded, write_csv

import bhpeft_pyro as bh


def test_history_lists_rounds_with_their_parents(folder, tmp_path):
    run = loaded(folder / "run", folder)
    rounds = bh.streams.History(tmp_path / "rounds")
    first = rounds.add(run, name="[red]monday")
    weeks = ({"text": [f"w{i} w9", f"w{i} w7"], "label": ["bad", "good"]} for i in (30, 31))
    children = [
        rounds.add(run.update(week, max_steps=2, batch_size=2, particles=1), name=name)
        for week, name in zip(weeks, ("tuesday", "instead"), strict=True)
    ]
    found = json.loads(bhpeft("history", tmp_path / "rounds", "--json").stdout)["rounds"]
    assert found[0]["id"] == first
    assert {row["id"]: row["parent"] for row in found} == {
        first: None,
        **dict.fromkeys(children, first),
    }
    shown = [line.split() for line in bhpeft("history", tmp_path / "rounds").stdout.splitlines()]
    lines = {line[0]: line[1:3] for line in shown if len(line) > 5}
    parents = [[first, name] for name in ("tuesday", "instead")]
    assert lines == {
        "id": ["parent", "name"],
        first: ["-", "[red]monday"],
        **dict(zip(children, parents, strict=True)),
    }
    listed = bhpeft("history", tmp_path / "rounds" / children[0]).stdout
    assert first in listed and children[0] in listed and children[1] not in listed
    assert "no rounds" in error("history", tmp_path / "nothing")
    lines = bhpeft("history", folder).stdout.splitlines()  # posteriors side by side are rounds too
    assert any(line.startswith(first) and line.endswith(" run") for line in map(str.strip, lines))
    for place, report in ((folder, 0), (folder / "run", -1)):
        found = json.loads(bhpeft("history", place, "--json").stdout)["rounds"]
        assert found[report]["folder"] == str(folder / "run")


def test_a_round_notes_how_good_it_was_on_held_out_rows(folder, tmp_path):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *ONE, *FIFTH, "--json")
    fitted = json.loads(bhpeft(*fit, "--out", tmp_path / "one").stdout)["held_out"]
    new = write_csv(tmp_path / "new.csv", text=[f"{text} w3" for text in TEXTS], label=NAMES)
    update = ("update", tmp_path / "one", new, *FIFTH, "--out", tmp_path / "two", "--json")
    after = json.loads(bhpeft(*update).stdout)["after"]
    rounds = json.loads(bhpeft("history", tmp_path / "two", "--json").stdout)["rounds"]
    for metrics, expected in zip((r["metrics"] for r in rounds), (fitted, after), strict=True):
        assert metrics == {f"held_out/{name}": value for name, value in expected.items()}
