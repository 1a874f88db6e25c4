"""The program `bhpeft`, in-process on a tiny transformer: values, exit codes, errors."""

from __future__ import annotations

import errno
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from program import bhpeft, error, read_csv, usage_error, write_csv
from saves import backbone_in
from typer import BadParameter

import bhpeft_pyro as bh
from bhpeft_pyro.base.fit_options import FitOptions
from bhpeft_pyro.cli import saved
from bhpeft_pyro.cli.options import Reading, share
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data.sources import load
from bhpeft_pyro.errors import DataError, FitError
from bhpeft_pyro.guides import DeltaGuide, NormalGuide
from bhpeft_pyro.guides.mean_field import ScaledAdam
from bhpeft_pyro.model import backbone
from bhpeft_pyro.testing import tiny_backbone, tiny_model

QUICK = ("--max-steps", "4", "--batch-size", "8", "--device", "cpu")
ONE = (*QUICK, "--components", "1")
FIFTH = ("--validation", "20%")
DATA = "owner/data"  # on the hub, and never read
TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(20)]
NAMES = ["good" if i % 2 else "bad" for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a backbone, and a posterior of classes with names."""
    root = tmp_path_factory.mktemp("cli")
    backbone_in(root / "tiny")
    write_csv(root / "train.csv", text=TEXTS, label=NAMES)
    write_csv(root / "new.csv", id=range(5), text=["w5 w9", "w6 w9", "w6", "w7 w8", "w33"])
    fit = ("fit", root / "train.csv", "--backbone", root / "tiny", "--components", 2, *QUICK)
    bhpeft(*fit, "--out", root / "run")
    return root


@pytest.fixture(scope="module")
def posterior(folder: Path) -> bh.Posterior:
    return bh.Posterior.load(folder / "run", *_tiny(folder))


def _tiny(folder: Path) -> Any:
    return backbone.load_backbone(str(folder / "tiny"), "cpu")[:1]


def test_two_commands_from_a_csv_to_flagged_predictions(folder, posterior, tmp_path):
    out = tmp_path / "out.csv"
    result = bhpeft("predict", folder / "run", folder / "new.csv", "--flag", "40%", "--out", out)
    rows = read_csv(out)
    forecast = posterior.predict(str(folder / "new.csv"))
    assert list(rows[0]) == [
        *("id", "text", "prediction", "probability", "epistemic", "aleatoric", "flagged")
    ]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["prediction"] for row in rows] == [["bad", "good"][k] for k in forecast.label]
    for name, values in (
        ("probability", forecast.confidence),
        ("epistemic", forecast.epistemic),
        ("aleatoric", forecast.aleatoric),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-6)
    flagged = [i for i, row in enumerate(rows) if row["flagged"] == "True"]
    assert flagged == sorted(forecast.flag(0.4).tolist()) and len(flagged) == 2
    assert "5 rows, 2 flagged by total" in result.stderr
    shown = [int(n) for n in re.findall(r"^\s+(\d)\s", result.stdout, re.MULTILINE)]
    assert [row - 2 for row in shown] == forecast.flag(1.0).tolist()  # the header is row 1


def test_texts_that_are_certain_are_left_out_of_components(folder, posterior, tmp_path):
    data, out = folder / "new.csv", tmp_path / "out.csv"
    sure = posterior.predict(str(data), certainty=0.01)
    assert (sure.components == 1).any()
    bhpeft("predict", folder / "run", data, "--certainty", 0.01, "--out", out)
    found = [float(row["epistemic"]) for row in read_csv(out)]
    assert found == pytest.approx(sure.epistemic.tolist(), rel=1e-6)
    assert found != pytest.approx(posterior.predict(str(data)).epistemic.tolist(), rel=1e-6)
    wrong = error("predict", folder / "run", data, "--certainty", 0, "--out", out, "--overwrite")
    assert "--certainty=0.0 must be a finite number above 0 and at most 1" in wrong


def test_json_lines_keep_their_columns_and_types(folder, posterior, tmp_path):
    data = tmp_path / "new.jsonl"
    records = [
        {"text": "w5 w9", "tags": ["a", "b"], "flagged": "of old"},
        {"text": "w6 w7", "tags": [], "flagged": "of old"},
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    bhpeft("predict", folder / "run", data, "--by", "epistemic", "--show", 0)
    found = [
        json.loads(line) for line in (tmp_path / "new-predictions.jsonl").read_text().splitlines()
    ]
    assert [row["tags"] for row in found] == [["a", "b"], []]
    flagged = posterior.predict(["w5 w9", "w6 w7"]).flag(0.1, "epistemic").tolist()
    assert [row["flagged"] for row in found] == [i in flagged for i in range(2)]
    bhpeft("predict", folder / "run", data, "--out", tmp_path / "new.csv")
    assert json.loads(read_csv(tmp_path / "new.csv")[0]["tags"]) == ["a", "b"]


def test_columns_of_mixed_types_are_in_nobodys_way(folder, posterior, tmp_path):
    """Neither those that no command reads, nor labels that are not looked at."""
    rows = [
        {"id": i or "first", "text": text, "label": name}
        for i, (text, name) in enumerate(zip(TEXTS, NAMES, strict=True))
    ]
    data, half = tmp_path / "mixed.jsonl", tmp_path / "half.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    half.write_text("".join(json.dumps(row | {"label": row["id"]}) + "\n" for row in rows))
    scores = json.loads(bhpeft("evaluate", folder / "run", folder / "train.csv", "--json").stdout)
    result = bhpeft("evaluate", folder / "run", data, "--json")
    assert json.loads(result.stdout) == scores
    note = "mixed.jsonl, column 'id', line 2: 1: a int, where the first row has a str (and 18 more"
    assert result.output.count(note) == 1 and "this column is left out" in result.output
    whole = posterior.encode(folder / "train.csv")
    assert posterior.encode(str(data)).fingerprint == whole.fingerprint
    bhpeft("predict", folder / "run", half, "--out", tmp_path / "out.jsonl", "--show", 0)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in found] == ["first", *range(1, 20)]
    assert "no column 'label'" in error("evaluate", folder / "run", half)


def test_the_cells_of_a_file_are_written_as_they_were(folder, tmp_path):
    version, price, text = ["1.10", "1.9"], ["5.00", "0.12345678901234567890"], ["w5\rw6", "12"]
    data = write_csv(tmp_path / "new.csv", version=version, price=price, text=text)
    bhpeft("predict", folder / "run", data, "--show", 0)
    found = read_csv(tmp_path / "new-predictions.csv")
    assert [row["version"] for row in found] == version
    assert [row["price"] for row in found] == price
    assert [row["text"] for row in found] == text  # a bare carriage return ends no row
    lines = tmp_path / "new.jsonl"
    days = ["2024-03-01", "2024-03-02"]
    lines.write_text("".join(json.dumps({"text": "w5", "day": day}) + "\n" for day in days))
    bhpeft("predict", folder / "run", lines, "--show", 0)
    written = (tmp_path / "new-predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["day"] for line in written] == days
    lines.write_text('{"text": "w5", "note": "half \\ud83d"}\n')  # of an emoji
    bhpeft("predict", folder / "run", lines, "--show", 0, "--overwrite")
    (written,) = (tmp_path / "new-predictions.jsonl").read_text().splitlines()
    assert json.loads(written)["note"] == "half \ud83d"


def test_methods_are_compared_on_rows_that_none_has_learnt(folder, tmp_path):
    """And what is saved predicts as the table says; a second call fits nothing."""
    test = write_csv(tmp_path / "test.csv", text=["w5 w9", "w6 w9", "w6", "w7"], label=NAMES[:4])
    out = tmp_path / "compared"
    data = (folder / "train.csv", "--backbone", folder / "tiny", "--out", out, "--test", test)
    command = ("compare", *data, "--components", 2, *QUICK)
    result = bhpeft(*command)
    rows = {row["method"]: row for row in read_csv(out / "table.csv")}
    assert list(rows)[-1] == "2 components" and "2 hybrids, scaled" in result.stdout
    scores = json.loads(bhpeft("evaluate", out / "posterior", test, "--json").stdout)
    assert float(rows["2 components"]["nll"]) == pytest.approx(scores["nll"], abs=1e-6)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = bhpeft(*command, "--json")
    assert "fitting" not in again.stderr
    assert json.loads(again.stdout)["test_rows"] == 4
    assert "another choice of epochs" in error(*command, "--epochs", 2)
    assert "--test: got 0; expected rows" in error(*command, "--test", "0")


def test_an_update_that_may_grow_and_need_not_shows_both_rounds(folder, tmp_path):
    new = write_csv(tmp_path / "new.csv", text=[f"{text} w3" for text in TEXTS], label=NAMES)
    update = ("update", folder / "run", new, *QUICK, *FIFTH, "--grow", "--json")
    found = json.loads(bhpeft(*update, "--out", tmp_path / "same").stdout)
    assert {"before", "after"} <= found.keys()
    write_csv(new, text=TEXTS, label=["strange", "strange", *NAMES[2:]])
    found = json.loads(bhpeft(*update, "--out", tmp_path / "more").stdout)
    assert "held_out" in found and "before" not in found


def test_numbers_for_classes_that_have_names_are_noted(folder, tmp_path):
    numbers = write_csv(tmp_path / "numbers.csv", text=TEXTS, label=[0, 1] * 10)
    note = "labels are numbers: 0 stands for 'bad', 1 for 'good' and so on"
    assert note in bhpeft("evaluate", folder / "run", numbers).stderr
    assert note not in bhpeft("evaluate", folder / "run", folder / "train.csv").stderr


def test_evaluate_as_json_and_as_a_table(folder, posterior):
    expected = posterior.evaluate(str(folder / "train.csv"), 8, seed=3)
    options = ("--samples", 8, "--seed", 3)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", "--json", *options)
    found = json.loads(result.stdout)
    assert found.pop("examples") == 20
    assert found == pytest.approx(expected)
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", *options)
    for name, value in expected.items():
        assert re.search(rf"{name}\s+{value:.3f}", result.stdout), name


def test_fit_as_json_is_all_there_is_on_stdout(folder, tmp_path):
    arguments = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *QUICK)
    result = bhpeft(*arguments, "--out", tmp_path / "run", "--json", "--validation", "25%")
    found = json.loads(result.stdout)
    assert (found["round"], found["examples"], found["steps"]) == (1, 15, 5 * 4)  # the default's
    assert 0 <= found["held_out"]["accuracy"] <= 1
    assert "20 rows, classes: 'label' from 'text', 2 classes (bad, good)" in result.stderr


def test_held_out_rows_are_not_learnt_from(folder, tmp_path):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", "--out", tmp_path / "no")
    assert "--validation: 0.01 of 20 rows is 0" in error(*fit, "--validation", "1%")
    common = (folder / "train.csv", "--backbone", folder / "tiny", "--out", tmp_path / "run")
    other = write_csv(tmp_path / "other.csv", text=[f"{text} w9" for text in TEXTS], label=NAMES)
    result = bhpeft("fit", *common, *ONE, "--validation", other, "--json")
    assert json.loads(result.stdout)["examples"] == 20  # a file leaves all rows to learn from


def test_rows_are_held_out_as_fit_does_unless_a_share_is_given(folder, tmp_path):
    """Of few rows none are; of more, those that `fit` in Python takes with the same seed."""
    fit = ("--backbone", folder / "tiny", *ONE, "--preset", "head_only", "--out", tmp_path / "run")
    few = bhpeft("fit", folder / "train.csv", *fit)
    assert "--validation 20% does" in few.stderr and "fitting head_only" in few.stderr
    texts = [f"w{5 + i % 2} w{10 + i % 30} w{40 - i // 30}" for i in range(60)]
    more = write_csv(tmp_path / "more.csv", text=texts, label=NAMES * 3)
    result = bhpeft("fit", more, *fit, "--overwrite", "--json")
    run = bh.Posterior.load(tmp_path / "run", *_tiny(folder))
    said = [line for line in result.stderr.splitlines() if not line.startswith("note")]
    first = said.index(run.report.score)
    assert re.match(r"accuracy [01]\.\d+ ± 0\.\d+ on 12 held-out rows", said[first])
    assert said[first + 1].startswith(f"next: bhpeft predict {tmp_path / 'run'} ")
    assert "steps on 48 examples" in said[first + 2]
    train, held_out = run.encode({"text": texts, "label": NAMES * 3}).hold_out(0)
    assert (run.report.examples, run.report.held_out) == (len(train), len(held_out)) == (48, 12)
    assert json.loads(result.stdout)["held_out"] == pytest.approx(run.evaluate(held_out))


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
    first, second = bh.Posterior.load(tmp_path / "second", *_tiny(folder)).lineage
    assert (first.steps, second.steps) == (2 * 4, 2 * 3)
    assert first.name == second.name == "train.csv"
    assert second.options.batch_size == 8  # as in the first round
    run = bh.Posterior.load(folder / "run", *_tiny(folder))
    before_scores = run.evaluate(run.encode(folder / "train.csv").hold_out(0, 0.2)[1])
    assert found["before"] == pytest.approx(before_scores)
    assert "--overwrite" in error(*arguments)
    bhpeft(*arguments, "--max-steps", 1, "--overwrite", "--validation", 0)
    assert bh.Posterior.load(tmp_path / "second", *_tiny(folder)).report.steps == 2 * 1


def test_an_update_without_rows_to_look_at_does_not_inherit_patience(folder, tmp_path):
    first = (*ONE, "--patience", 2, "--temperature", 1, "--validation", "20%")
    first = (*first, "--backbone", folder / "tiny")
    bhpeft("fit", folder / "train.csv", *first, "--out", tmp_path / "first")
    again = ("update", tmp_path / "first", folder / "train.csv", "--again")
    for out, part, patience in (("none", 0, None), ("some", "20%", 2)):
        bhpeft(*again, "--validation", part, "--out", tmp_path / out)
        updated = bh.Posterior.load(tmp_path / out, *_tiny(folder))
        assert updated.report.options.patience == patience
    message = error(*again, "--validation", 0, "--patience", 3, "--out", tmp_path / "asked")
    assert "needs validation" in message


def test_history_lists_rounds_with_their_parents(folder, tmp_path):
    run = bh.Posterior.load(folder / "run", *_tiny(folder))
    rounds = bh.streams.History(tmp_path / "rounds")
    first = rounds.add(run, name="[red]monday")
    weeks = ({"text": [f"w{i} w9", f"w{i} w7"], "label": ["bad", "good"]} for i in (30, 31))
    children = [
        rounds.add(run.update(week, max_steps=2, batch_size=2, particles=1), name=name)
        for week, name in zip(weeks, ("tuesday", "instead"), strict=True)
    ]
    found = json.loads(bhpeft("history", tmp_path / "rounds", "--json").stdout)["rounds"]
    assert found[0]["id"] == first
    assert {each["id"]: each["parent"] for each in found} == {
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
    model, labelled = tiny_model(), {"text": TEXTS, "label": NAMES}
    elsewhere = bh.Posterior.of(model, bh.autoguide("normal", model), labelled)
    other = bh.streams.History(tmp_path / "elsewhere")
    id = other.add(elsewhere)  # it has no trace of a loss
    (found,) = json.loads(bhpeft("history", tmp_path / "elsewhere", "--json").stdout)["rounds"]
    assert found["id"] == id and found["negative_elbo"] is None
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


def test_update_forgets_grows_and_refuses_what_it_knows(folder, tmp_path):
    quick = ("--max-steps", 3, "--validation", 0, "--overwrite", "--out", tmp_path / "next")
    texts = [f"w{9 + i} w40" for i in range(8)]
    new = write_csv(tmp_path / "new.csv", text=texts, label=["strange"] * 8)
    assert "strange" in error("update", folder / "run", new, *quick)  # no such label yet
    shown = bhpeft("update", folder / "run", new, *quick, "--grow", "--keep", 0.5)
    assert "new classes: strange\n" in shown.stderr
    grown = bh.Posterior.load(tmp_path / "next", *_tiny(folder))
    assert grown.columns.label_names[-1] == "strange" and grown.model.network.outputs == 3
    assert grown.report.keep == 0.5
    assert "--again" in error("update", tmp_path / "next", new, *quick)
    for more in (("--seed", 1), ("--validation", 0), ("--validation", "30%")):  # other rows of it
        same = ("update", folder / "run", folder / "train.csv", "--out", tmp_path / "no", *more)
        assert "has learnt 20 of these examples already" in error(*same)
    bhpeft("update", tmp_path / "next", new, *quick, "--again")
    bhpeft("update", tmp_path / "next", new, *quick, "--again", "--guide", "normal")
    last = bh.Posterior.load(tmp_path / "next", *_tiny(folder))
    assert len(last.lineage) == 4
    assert [type(each.guide) for each in last.components] == [NormalGuide] * 2
    assert last.report.projection > 0  # the correlations that a mean-field guide cannot hold
    assert "'low' is not one of" in usage_error("update", tmp_path, new, *quick, "--guide", "low")


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


def test_options_on_the_command_line_win_over_the_file(folder, tmp_path):
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"data: {folder / 'train.csv'}\nbackbone: {folder / 'tiny'}\nmax_steps: 2\nbatch-size: 8\n"
        "preset: head_only\nvalidation: 0\ncomponents: 1\nbf16: yes\nseed: 5\npatience:\n"
        "device: cpu\n"
    )
    bhpeft("fit", "--config", config, "--out", tmp_path / "run", "--max-steps", 3, "--no-bf16")
    fitted = bh.Posterior.load(tmp_path / "run", *_tiny(folder))
    assert fitted.model.network.kinds == ()
    assert fitted.report.options == FitOptions(max_steps=3, batch_size=8, seed=5, bf16=False)
    bhpeft("fit", "--config", config, "--out", tmp_path / "bf16", "--max-steps", 1)
    assert bh.Posterior.load(tmp_path / "bf16", *_tiny(folder)).report.options.bf16
    config.write_text("samples: 8\nseed: 3\njson: true\n")
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", "--config", config)
    own = bhpeft(
        *("evaluate", folder / "run", folder / "train.csv", "--samples", 8, "--seed", 3, "--json")
    )
    assert json.loads(result.stdout) == json.loads(own.stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "'epoch', which is not an option of 'fit'.*epochs"),
        ("config: other.yaml", "'config'"),
        ("- 1", "no `option: value` lines"),
        ("a: [", "cannot be read as YAML"),
        ("epochs: {}", "epochs: expected a single value"),
        ("? [a]\n: b", "cannot be read as YAML"),
    ],
)
def test_a_bad_config_file_is_an_error(tmp_path, content, message):
    config = tmp_path / "fit.yaml"
    config.write_text(content)
    assert re.search(message, error("fit", DATA, "--out", tmp_path, "--config", config))


def test_values_of_a_config_file_are_read_as_on_the_command_line(tmp_path):
    config = tmp_path / "fit.yaml"
    for value in ("2.5", "2024-13-45"):
        config.write_text(f"epochs: {value}")
        result = bhpeft("fit", DATA, "--out", tmp_path / "run", "--config", config, code=2)
        assert "'--epochs': Input should be a valid integer" in result.stderr


def test_ratings(folder, tmp_path):
    stars = [float(1 + i % 5) for i in range(20)]
    data = write_csv(tmp_path / "films.csv", review=TEXTS, stars=stars)
    arguments = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run", *ONE)
    result = bhpeft(*arguments, *FIFTH, "--preset", "lora", "--noise-by-text", "--json")
    assert "ratings: 'stars' from 'review', between 1 and 5" in result.stderr
    assert "sd 1.41\nnote: there are 5 different ratings: intervals end at 1 and 5" in result.stderr
    assert "mse" in json.loads(result.stdout)["held_out"]
    bhpeft("predict", tmp_path / "run", data, "--out", tmp_path / "out.csv", "--samples", 4)
    rows = read_csv(tmp_path / "out.csv")
    # Their sd is above 1: without ends these intervals would be wider than the scale.
    assert all(1 <= float(row["lower_90"]) < float(row["upper_90"]) <= 5 for row in rows)
    forecast = bh.Posterior.load(tmp_path / "run", *_tiny(folder)).predict(str(data), 4)
    lower, upper = forecast.interval(0.9)
    for name, values in (
        ("prediction", forecast.mean),
        ("sd", forecast.sd),
        ("lower_90", lower),
        ("upper_90", upper),
        ("epistemic", forecast.epistemic),
    ):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("ratings", "levels"),
    [([1.0, 5.0, 3.0], 3), ([1, 2], 2), ([1.5, 4.0], 0), ([float(i) for i in range(12)], 0)],
)
def test_scales_of_few_whole_numbers_have_ends(ratings, levels):
    """Where the least and the greatest of many numbers are, chance decides."""
    table = Dataset.from_dict({"text": ["w5"] * len(ratings), "stars": ratings})
    task = infer(table)
    assert task.levels == levels
    likelihood = task.model(tiny_backbone(), None, ()).likelihood
    ends = (min(ratings), max(ratings)) if levels else (None, None)
    assert (likelihood.low, likelihood.high) == ends


def test_multiple_choice(folder, tmp_path):
    data = tmp_path / "quiz.jsonl"
    rows = [
        {
            "question": TEXTS[i],
            "choices": [f"w{i + 9}", f"w{i + 20}", "w7"][: 2 + i % 2],
            "answer": 0,
        }
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run", *QUICK)
    result = bhpeft(*arguments, "--guide", "delta")
    assert "12 rows, choices: 'answer' from 'question and choices'" in result.stderr
    result = bhpeft("predict", tmp_path / "run", data)
    assert "flagged by total" in result.stderr  # a point guide has no epistemic uncertainty
    fitted = bh.Posterior.load(tmp_path / "run", *_tiny(folder))
    assert isinstance(fitted.guide, DeltaGuide)
    forecast = fitted.predict(str(data), 0)
    lines = (tmp_path / "quiz-predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
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


def test_predictions_can_be_predicted_again(folder, tmp_path):
    again = tmp_path / "again.csv"
    bhpeft("predict", folder / "run", folder / "new.csv", "--out", tmp_path / "out.csv")
    bhpeft("predict", folder / "run", tmp_path / "out.csv", "--out", again)
    assert again.read_text() == (tmp_path / "out.csv").read_text()


def test_no_cell_is_a_formula_and_a_file_comes_back_as_it_was(folder, tmp_path):
    """A spreadsheet would run `=HYPERLINK(...)`; the next command reads what was meant."""
    rows = ["=w5 w9", "+w6", "-w7 w8", "@w33 w5", "\tw5", "'w5"]
    prices = ["-1.5", "+2", "-3", "-4", "5", "6"]
    write_csv(tmp_path / "new.csv", **{"text": rows, "=price": prices})
    bhpeft("predict", folder / "run", tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    found = read_csv(tmp_path / "out.csv")
    assert [row["text"] for row in found] == [f"'{text}" for text in rows[:-1]] + ["'w5"]
    assert [row["'=price"] for row in found] == prices  # numbers stay numbers
    bhpeft("predict", folder / "run", tmp_path / "out.csv", "--out", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()
    given, predicted = (load(tmp_path / name, None) for name in ("new.csv", "out.csv"))
    assert [predicted[name] for name in given.column_names] == [*given.to_dict().values()]


def test_predictions_are_not_replaced_unless_told(folder, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    predict = ("predict", folder / "run", folder / "new.csv", "--out", out)
    assert "--overwrite" in error(*predict) and out.read_text() == "mine"
    bhpeft(*predict, "--overwrite")
    assert len(read_csv(out)) == 5


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
    assert infer(Dataset.from_dict(columns)).name == task


@pytest.mark.parametrize("column", ["question", "choices"])
def test_a_label_may_have_the_name_of_a_column_of_choices(column):
    table = Dataset.from_dict({"text": ["a", "b"], column: ["no", "yes"]})
    assert infer(table, Reading(label_column=column)).name == "classes"


def test_what_is_not_clear_is_asked():
    def table(**columns):
        return Dataset.from_dict(columns)

    two = ["a", "b"]
    for columns, message in (
        (table(text=two, label=[1, 5]), "--task classes, or --task ratings \\(if"),
        (table(text=two, label=two, rating=[1, 2]), "label, rating may all be .*--label-column"),
        (table(text=two, verdict=two), "to be the label; columns there: text, verdict; name it"),
        (table(title=two, body=two, label=two), "title, body may all be .*--text-column"),
        (table(n=[1, 2], label=two), "no column is known to be the text"),
        (table(text=two, label=["a", "a"]), "at least two classes"),
        (table(text=two, label=["a", None]), "row 1: the label is missing"),
        (table(text=["a", None], label=["a", None]), "^row 1: all cells are empty; delete"),
        (table(text=two, rating=[2, 2]), "all 2 ratings are 2"),
    ):
        with pytest.raises(DataError, match=message):
            infer(columns)
    with pytest.raises(DataError, match="row 0: 'a' is not a number"):
        infer(table(text=two, label=two), Reading(task="ratings"))
    with pytest.raises(DataError, match="'answer'"):
        infer(table(question=two, choices=[two, two]), Reading(task="choices"))
    quiz = table(question=two, choices=[two, two], answer=[0, 1])
    for option in ("text", "pair"):
        with pytest.raises(DataError, match=f"--{option}-column: got 'body', but multiple choice"):
            infer(quiz, Reading(**{f"{option}_column": "body"}))
    for columns in (quiz, table(text=two, label=two)):
        with pytest.raises(DataError, match=r"--noise-by-text: the task is (choices|classes)"):
            infer(columns, Reading(noise_by_text=True))


@pytest.mark.parametrize("cell", ["nan", "NA", "3,5", "inf"])
def test_a_cell_that_is_no_number_makes_no_classes_of_ratings(folder, tmp_path, cell):
    stars = [*(f"{1 + i / 7:.4f}" for i in range(19)), cell]
    data = write_csv(tmp_path / "films.csv", text=TEXTS, rating=stars)
    fit = ("fit", data, "--backbone", folder / "tiny", "--out", tmp_path / "run")
    for more in ((), ("--task", "ratings")):
        assert re.search(rf"'rating', row 21: '?{cell}'?\b", error(*fit, *more))
    assert infer(Dataset.from_dict({"text": TEXTS, "rating": NAMES})).name == "classes"
    commas = [each.replace(".", ",") for each in stars[:19]]
    data = write_csv(tmp_path / "films.csv", text=TEXTS[:19], rating=commas)
    assert "'rating', row 2: '1,0000' is not a number" in error(*fit)


def test_columns_and_classes_that_are_mixed_up_are_named():
    rows = {"text": TEXTS, "label": [*NAMES[:-1], f" {NAMES[0].upper()}"]}
    with pytest.warns(UserWarning, match=rf"' {NAMES[0].upper()}' .* are two classes"):
        infer(Dataset.from_dict(rows))
    with pytest.raises(DataError, match="'text' cannot be the text and the label"):
        infer(Dataset.from_dict(rows), Reading(label_column="text"))
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        with pytest.raises(DataError, match=f"the cells have {called} between them"):
            infer(Dataset.from_dict({f"text{mark}label": [f"w5{mark}good"]}))


def test_rows_are_counted_in_the_file_and_all_checked_before_the_fit(folder, tmp_path, monkeypatch):
    def work(*_args, **_more):
        raise AssertionError("trained")

    monkeypatch.setattr("bhpeft_pyro.posterior.round.optimise", work)
    fit = ("--backbone", folder / "tiny", "--out", tmp_path / "out", *QUICK)
    rows = bh.Posterior.load(folder / "run", *_tiny(folder)).encode(folder / "train.csv")
    for row in (int(part.rows[0]) for part in rows.hold_out(0, 0.2)):  # one kept, one held out
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
    assert "--grow" in error("update", folder / "run", odd, "--out", "x")


def test_numbers_that_do_not_count_from_zero_are_names():
    table = Dataset.from_dict({"text": ["a", "b", "c"], "label": [10, 2, 10]})
    task = infer(table, Reading(task="classes"))
    assert task.columns.label_names == ("2", "10") and task.classes == 2
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    hub = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    assert infer(hub).columns.label_names == ("x", "y", "z")


def test_options_without_an_effect_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *ONE, "--out", out)
    none = tmp_path / "none.csv"
    none.touch()
    gone = (none, *fit[2:])  # refused before anything is read
    update = ("update", folder / "run", folder / "train.csv", "--again", "--out", out)
    stars = write_csv(tmp_path / "stars.csv", text=TEXTS, stars=[1 + i % 5 for i in range(20)])
    rated = ("fit", stars, *fit[2:])
    bhpeft(*rated, "--guide", "delta", "--out", tmp_path / "point")
    bhpeft(*rated, "--out", tmp_path / "rated")
    new = ("predict", tmp_path / "point", folder / "new.csv", "--out", tmp_path / "new.jsonl")
    for arguments, message in (
        ((*fit, "--guide", "normal", "--tau", 3), "--tau works only with --guide laplace"),
        ((*fit, "--guide", "A only", "--tau", 3), "--tau works only"),
        ((*update, "--guide", "normal", "--tau", 3), "--tau works only"),
        (("stream", *fit[1:], "--batch", 9, "--guide", "normal", "--tau", 3), "--tau works"),
        ((*fit, *FIFTH, "--patience", 2), "--patience has no effect on a first laplace fit"),
        ((*fit, "--validation", 0, "--samples", 8), "--samples: no rows are predicted"),
        ((*update, "--validation", 0, "--samples", 8), "--samples: no rows are predicted"),
        (
            ("fit", *gone, *FIFTH, "--guide", "delta", "--patience", 2),
            "--patience has no effect on a first delta fit",
        ),
        (("fit", *gone, "--guide", "normal", "--tau", 3), "--tau works only"),
        ((*fit, *FIFTH, "--guide", "delta", "--samples", 8), "--samples: delta is a point"),
        ((*rated, *FIFTH, "--samples", 8), "--samples: forecasts of ratings under laplace are"),
        (("evaluate", tmp_path / "rated", stars, "--samples", 8), "--samples: forecasts of"),
        (("report", folder / "run", "--samples", 8, "--out", tmp_path / "r.html"), "no rows are"),
        ((*new, "--samples", 8), "--samples: delta is a point"),
        ((*new, "--by", "epistemic"), "--by: got 'epistemic', of which a point"),
    ):
        assert re.search(message, error(*arguments)), arguments
    bhpeft(*fit, "--components", 1, "--out", tmp_path / "one")
    one = ("predict", tmp_path / "one", folder / "new.csv", "--out", tmp_path / "new.jsonl")
    assert "--certainty: got 0.5, but there is one" in error(*one, "--certainty", 0.5)
    # The same where they have an effect.
    bhpeft("evaluate", tmp_path / "rated", stars, "--samples", 0)
    bhpeft(*fit, *FIFTH, "--patience", 2, "--temperature", 1)


def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path):
    train, tiny, run, out = folder / "train.csv", folder / "tiny", folder / "run", tmp_path / "x"
    fit = ("fit", train, "--out", out, "--backbone", tiny)
    lists, stream = tmp_path / "lists.jsonl", tmp_path / "stream"
    lists.write_text('{"text": "w5", "label": ["a"]}\n{"text": "w6", "label": ["b"]}\n')
    partly = write_csv(tmp_path / "partly.csv", text=["w5", "w6"], label=["bad", ""])
    sheet = tmp_path / "sheet.xlsx"
    sheet.touch()
    empty = write_csv(tmp_path / "empty.csv", text=[], label=[])
    (stream / "rounds").mkdir(parents=True)
    for arguments, message in (
        (("fit", tmp_path / "no.csv", "--out", out), "no such file"),
        (("fit", sheet, "--out", out), 'save it as "CSV UTF-8"'),
        (("fit", tmp_path / "no.xlsx", "--out", out), "no.xlsx: no such file"),
        (("evaluate", tmp_path / "none", train), "there is no folder .*none"),
        ((*fit, "--validation", "no.csv"), "no.csv: no such file"),
        ((*fit, "--batch-size", 6), "--batch-size 6 must be a multiple of 4, as each .* a batch$"),
        ((*fit, "--label-column", "no"), "--label-column"),
        ((*fit, "--patience", 2, "--validation", 0), "needs validation"),
        (("fit", train, "--out", run), "--overwrite"),
        (("fit", train, "--out", train), "is a file"),
        (("fit", train, "--out", out, "--backbone", tmp_path / "none"), "'smollm2' come from PyPI"),
        (("predict", tmp_path, train), "no saved posterior"),
        (
            ("predict", run, folder / "new.csv", "--out", folder / "new.csv"),
            "is the data",
        ),
        (("predict", run, train, "--out", "x.parquet"), "should end in"),
        (("predict", run, train, "--flag", 0, "--out", tmp_path / "y.csv"), "flags no row"),
        (("evaluate", run, folder / "new.csv"), "no column 'label'.*id, text"),
        (
            ("fit", lists, "--task", "classes", "--out", out),
            r"line 1: \['a'\] is a list; expected an integer or a str",
        ),
        (
            ("report", run, partly, "--out", tmp_path / "x.html"),
            "partly.csv, .* row 3: the label is",
        ),
        (("fit", empty, "--out", out), "is empty: at least one row"),
        (("evaluate", run, empty), "is empty: at least one row"),
        (("fit", train, "--out", train / "x", "--backbone", tiny), "--out: .* is a file"),
        (("fit", train, "--out", stream), "holds a stream"),
        (("report", run, "--out", "x.pdf"), "should end in"),
    ):
        assert re.search(message, error(*arguments)), arguments
    for arguments, message in (
        ((*fit, "--preset", "lore"), "'lore' is not one of .*'lora'"),
        ((*fit, "--guide", "AutoNormal"), "'AutoNormal' is not one of 'laplace', 'normal'"),
        (("predict", run, train, "--flag", 10), "'10' is not a share; expected 10% or 0.1"),
        ((*fit, "--validation", "101%"), "'101%' is not a share"),
        (
            ("predict", run, train, "--out", tmp_path / "y.csv", "--by", "x"),
            "'x' is not one of",
        ),
    ):
        assert re.search(message, usage_error(*arguments)), arguments
    assert not out.exists() and not (tmp_path / "y.csv").exists()


def test_a_folder_that_cannot_be_written_into_is_refused_before_the_fit(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(saved.os, "access", lambda *_: False)
    assert "no permission" in error("fit", folder / "train.csv", "--out", tmp_path / "a" / "b")


def test_other_backbones_are_refused_and_moved_ones_found(folder, tmp_path):
    other = tiny_backbone()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight += 1
    for name, model in (("other", other), ("moved", tiny_backbone())):
        backbone_in(tmp_path / name, model)
    evaluate = ("evaluate", folder / "run", folder / "train.csv", "--json", "--samples", 2)
    assert "fitted on another one" in error(*evaluate, "--backbone", tmp_path / "other")
    moved = bhpeft(*evaluate, "--backbone", tmp_path / "moved")
    assert moved.stdout == bhpeft(*evaluate).stdout


def test_other_failures_have_exit_code_1(folder, tmp_path, monkeypatch):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *ONE)
    monkeypatch.setattr(bh.Posterior, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert "full" in error(*fit, "--out", tmp_path / "run", code=1)
    evaluate = ("evaluate", folder / "run", folder / "train.csv")
    for few in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory\n\n")):
        monkeypatch.setattr(bh.Posterior, "evaluate", Mock(side_effect=few))
        assert "not enough memory" in error(*evaluate, code=1)
    monkeypatch.setattr(bh.Posterior, "evaluate", lambda *_, **__: 1 / 0)
    result = bhpeft(*evaluate, code=1)
    assert isinstance(result.exception, ZeroDivisionError)  # a bug keeps its traceback
    monkeypatch.undo()

    def diverge(*_):
        raise FitError("not finite")

    monkeypatch.setattr("bhpeft_pyro.posterior.round.optimise", diverge)
    assert "not finite" in error(*fit, "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_enough_is_no_error(folder, monkeypatch):
    closed = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr("typer.echo", Mock(side_effect=closed))  # as under `| head`
    assert bhpeft("history", folder / "run", "--json", code=1).stderr == ""


def test_components_are_one_run_that_all_commands_take(folder, tmp_path):
    run, train = tmp_path / "run", folder / "train.csv"
    fit = ("fit", train, "--backbone", folder / "tiny", "--components", 3, *QUICK, "--seed", 5)
    fit = (*fit, "--tau", 2.0)
    bhpeft(*fit, "--out", run)
    loaded = bh.Posterior.load(run, *_tiny(folder))
    assert [each.report.options.seed for each in loaded.components] == [5, 1005, 2005]
    assert [each.report.tau for each in loaded.components] == [2.0] * 3
    single = tmp_path / "single"
    bhpeft(*fit[:5], 1, *fit[6:], "--out", single)
    first = loaded.components[0].guide.state_dict()
    for name, value in bh.Posterior.load(single, *_tiny(folder)).guide.state_dict().items():
        assert torch.equal(value, first[name])
    shown = json.loads(bhpeft("evaluate", run, train, "--json", "--samples", 6).stdout)
    expected = loaded.evaluate(str(train), 6)
    assert {name: shown[name] for name in expected} == pytest.approx(expected)
    none = bhpeft(*fit[:5], 0, *fit[6:], "--out", tmp_path / "none", code=2)
    assert "'--components'" in none.stderr and not (tmp_path / "none").exists()


def test_reports(folder, posterior, tmp_path):
    page = tmp_path / "report.html"
    arguments = ("report", folder / "run", folder / "train.csv", "--samples", 4)
    bhpeft(*arguments, "--out", page)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 5  # three of the test, the change, the trace
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)  # nothing from elsewhere
    scores = posterior.evaluate(str(folder / "train.csv"), 4)
    for name, value in scores.items():
        assert re.search(rf"<td [^>]*>{name}</td><td [^>]*>{value:.4g}</td>", html), name
    assert str(posterior.report) in unescape(html)
    listed = html[html.index("Least certain") :]
    order = posterior.predict(str(folder / "train.csv"), 4).flag(1.0)[:10].tolist()
    found = re.findall(r'<tr><td [^>]*right">(\d+)</td>', listed)
    assert [int(row) for row in found] == order
    bhpeft("report", folder / "run", "--out", page)
    assert page.read_text().count("data:image/png") == 2


def test_texts_cannot_break_a_page(folder, tmp_path):
    data = write_csv(tmp_path / "x.csv", text=["w5 | <b> w6", "w6\nw7"], label=["bad", "good"])
    bhpeft("report", folder / "run", data, "--out", tmp_path / "report.html", "--samples", 2)
    html = (tmp_path / "report.html").read_text()
    assert "<b>" not in html and "w5 | &lt;b&gt; w6" in html


def test_shares():
    assert share("10%") == share("0.1") == pytest.approx(0.1)
    for text in ("10", "-1%", "x", "nan", "101%"):
        with pytest.raises(BadParameter, match="is not a share"):
            share(text)


def test_json_has_no_word_for_infinity(capsys):
    from bhpeft_pyro.cli.screen import print_json

    print_json({"nll": math.inf, "held_out": {"mse": math.nan, "n": 3}})
    assert json.loads(capsys.readouterr().out) == {"nll": None, "held_out": {"mse": None, "n": 3}}


def test_a_file_whose_text_has_another_name(folder, posterior, tmp_path):
    data = write_csv(tmp_path / "new.csv", review=["w5 w9", "w6 w9"], text=["w6", "w6"])
    out = tmp_path / "out.jsonl"
    bhpeft("predict", folder / "run", data, "--text-column", "review", "--out", out, "--show", 0)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    expected = posterior.predict(["w5 w9", "w6 w9"])
    assert [row["probability"] for row in found] == pytest.approx(expected.confidence.tolist())
    assert [row["text"] for row in found] == ["w6", "w6"]
    again = ("predict", folder / "run", data, "--text-column", "no", "--out", tmp_path / "x.csv")
    assert "has no column 'no'" in error(*again)


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


def test_texts_that_look_like_numbers_are_texts(folder, tmp_path):
    data = write_csv(tmp_path / "codes.csv", text=range(20), other=["w5", "w6"] * 10, label=NAMES)
    fit = ("fit", data, "--pair-column", "other", "--backbone", folder / "tiny")
    said = bhpeft(*fit, "--out", tmp_path / "run", *ONE).stderr
    assert "classes: 'label' from 'text and other'" in said
