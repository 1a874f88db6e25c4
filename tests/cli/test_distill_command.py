"""`bhpeft distill`: a student in the folder of its posterior."""

from __future__ import annotations

import inspect
import json
import re
from unittest.mock import Mock

import pytest
import torch
from program import FIFTH, NAMES, TEXTS, UNLABELLED, bhpeft, error, loaded, write_csv

import bhpeft_pyro as bh
from bhpeft_pyro.cli.learn_commands import distill
from bhpeft_pyro.errors import FitError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.streams import History
from bhpeft_pyro.testing import tiny_examples

QUICK = ("--epochs", 1, "--device", "cpu")


def test_the_student_is_saved_in_the_run_which_is_otherwise_as_it_was(
    copied, folder, unlabelled, posterior
):
    said = bhpeft("distill", copied, unlabelled, *QUICK, "--seed", 2, "--batch-size", 8).stderr
    after = loaded(copied, folder)
    expected = posterior.distill(UNLABELLED, epochs=1, seed=2, batch_size=8, progress=False)
    assert after.report == posterior.report and after.lineage == posterior.lineage
    assert after.student is not None and expected.student is not None
    for name, value in expected.student.weights.items():
        assert torch.equal(after.student.weights[name], value)
    told, own = str(after.student.report), str(expected.student.report)
    assert told == own and told in said
    exact = [each.predict(TEXTS, method="exact").probabilities for each in (after, posterior)]
    assert torch.equal(*exact)
    bhpeft("distill", copied, unlabelled, *QUICK)  # makes another
    assert loaded(copied, folder).student.report.texts == 48


def test_another_folder_and_another_column(run, folder, tmp_path):
    before = (run / "posterior.safetensors").read_bytes()
    data = write_csv(tmp_path / "texts.csv", text=["w5"] * 60, body=UNLABELLED)
    arguments = ("distill", run, data, *QUICK, "--out", tmp_path / "out")
    assert "texts: got 1 different text; expected at least 50" in error(*arguments)
    assert not (tmp_path / "out").exists()
    bhpeft(*arguments, "--text-column", "body")
    assert (run / "posterior.safetensors").read_bytes() == before
    after = loaded(tmp_path / "out", folder)
    assert after.student is not None and after.columns.text == "text"
    assert "--overwrite" in error(*arguments, "--text-column", "body")


def test_labels_of_the_texts_give_the_report_its_nll(run, tmp_path):
    labels = ["good" if i % 2 else "bad" for i in range(60)]
    data = write_csv(tmp_path / "labelled.csv", text=UNLABELLED, label=labels)
    said = bhpeft("distill", run, data, *QUICK, "--out", tmp_path / "out").stderr
    assert re.search(r"NLL \d\.\d{3}, of the posterior \d\.\d{3}", said)


def test_how_near_a_student_comes_is_there_as_json(run, folder, tmp_path):
    data = write_csv(tmp_path / "texts.csv", text=UNLABELLED)
    said = bhpeft("distill", run, data, *QUICK, "--out", tmp_path / "out", "--json").stdout
    student = loaded(tmp_path / "out", folder).student
    assert json.loads(said)["divergence"] == student.report.divergence


def test_labels_that_cannot_be_read_are_in_nobodys_way(run, folder, tmp_path):
    labels = ["new"] * 60
    data = write_csv(tmp_path / "labelled.csv", text=UNLABELLED, label=labels)
    said = bhpeft("distill", run, data, *QUICK, "--out", tmp_path / "out").stderr
    assert "note: labels are not read: labelled.csv, column 'label', row 2: 'new'" in said
    assert loaded(tmp_path / "out", folder).student.report.nll is None
    empty = write_csv(tmp_path / "empty.csv", text=["", *UNLABELLED], label=["bad", *labels])
    assert "empty.csv, column 'text', row 2: the text is" in error("distill", run, empty)


def test_several_labels(labels, unlabelled, tmp_path):
    bhpeft("distill", labels / "run", unlabelled, *QUICK, "--out", tmp_path / "out")
    out = tmp_path / "predictions.csv"
    said = bhpeft("predict", tmp_path / "out", unlabelled, "--show", 0, "--out", out).stderr
    assert "forecasts by the student, 1 pass a text" in said


def test_a_stream_gets_the_student_of_its_last_round(folder, unlabelled, tmp_path):
    options = {"max_steps": 2, "progress": False, "components": 2}
    backbone = loaded(folder / "run", folder).model.network.backbone
    tokenizer = loaded(folder / "run", folder).model.network.tokenizer
    model = bh.tasks.categories(backbone, 2, kinds=(), tokenizer=tokenizer)
    weeks = {f"week {i}": tiny_examples(12, seed=i) for i in range(2)}
    last = bh.stream(model, weeks, tmp_path / "stream", **options)
    history = History(tmp_path / "stream" / "rounds")
    known = ("--backbone", folder / "tiny", *QUICK)
    said = bhpeft("distill", tmp_path / "stream", unlabelled, *known).stderr
    path = history.folders[last.report.id]
    assert f"saved in {path}" in said
    first, second = (history.load(id, backbone, tokenizer=tokenizer) for id in history.rounds)
    assert first.student is None and second.student is not None
    assert [report.id for report in second.lineage] == [report.id for report in last.lineage]
    again = bh.stream(model, weeks, tmp_path / "stream", **options)  # nothing is new
    assert again.report.id == last.report.id


def test_what_cannot_work_is_refused(folder, run, unlabelled, tmp_path):
    for arguments, message in (
        ((tmp_path / "none", unlabelled), "there is no folder .*none"),
        ((run, tmp_path / "none.csv"), "none.csv: no such file"),
        ((tmp_path, unlabelled), "no saved posterior in"),
        ((run, folder / "new.csv"), "texts: got 5 different texts; expected at least 50"),
        ((run, unlabelled, "--text-column", "no"), "column 'no' is missing"),
        ((run, unlabelled, "--lr", 0), "lr="),
        ((run, unlabelled, "--out", unlabelled), "--out: .* is a file"),
    ):
        assert re.search(message, error("distill", *arguments)), arguments


def test_a_training_that_diverges_says_so(run, unlabelled, tmp_path):
    options = ("--lr", 1e30, "--device", "cpu", "--out", tmp_path / "fast")
    told = error("distill", run, unlabelled, *options, code=1)
    assert told.startswith("error: distill: ")


def test_the_defaults_are_those_of_python():
    own, python = (inspect.signature(each).parameters for each in (distill, bh.Posterior.distill))
    for name in ("epochs", "batch_size", "lr", "seed"):
        assert own[name].default == python[name].default


def test_fit_and_update_make_a_student_at_the_end(folder, unlabelled, tmp_path):
    train, tiny = folder / "train.csv", folder / "tiny"
    fit = ("fit", train, "--backbone", tiny, "--preset", "head_only", "--components", 2)
    fit = (*fit, "--max-steps", 4, "--device", "cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    said = bhpeft(*fit, *FIFTH, "--out", first, "--distill", unlabelled, "--json")
    after, found = loaded(first, folder), json.loads(said.stdout)
    told = said.stderr.replace("\n", " ")
    assert str(after.student.report).replace("\n", " ") in told
    rows = after.encode(str(train)).hold_out(0, 0.2)[1]
    exact, student = (
        metrics.evaluate(after.predict(rows, method=name)) for name in ("exact", "student")
    )
    assert found["held_out"] == pytest.approx(exact) != pytest.approx(student)
    update = ("update", first, train, "--again", "--max-steps", 2, *FIFTH, "--json")
    found = json.loads(bhpeft(*update, "--out", second, "--distill", unlabelled).stdout)
    assert found["before"] == pytest.approx(exact)
    after = loaded(second, folder)
    assert after.student.report.round == after.report.id
    few = ("--distill", folder / "new.csv", "--out", tmp_path / "few")
    for arguments in ((*fit, *few), (*update, *few)):
        assert "distill: got 5 different texts" in error(*arguments)
    assert not (tmp_path / "few").exists()


def test_a_round_is_saved_though_its_student_failed(folder, run, unlabelled, tmp_path, monkeypatch):
    failed = Mock(side_effect=FitError("not finite"))
    monkeypatch.setattr("bhpeft_pyro.posterior.distill.distil", failed)
    update = ("update", run, folder / "train.csv", "--again", "--max-steps", 2, *FIFTH)
    out = ("--out", tmp_path / "out", "--distill", unlabelled)
    result = bhpeft(*update, *out, code=1)
    assert "error: not finite" in result.stderr and f"saved in {tmp_path / 'out'}" in result.stderr
    after = loaded(tmp_path / "out", folder)
    assert after.student is None and len(after.lineage) == 2


def test_each_round_of_a_stream_has_a_student(folder, unlabelled, tmp_path):
    data = write_csv(tmp_path / "train.csv", text=TEXTS, label=NAMES)
    stream = ("stream", data, "--batch", 10, "--backbone", folder / "tiny", "--components", 1)
    stream = (*stream, "--preset", "head_only", "--max-steps", 2, "--device", "cpu")
    few = ("--distill", folder / "new.csv", "--out", tmp_path / "few")
    assert "distill: got 5 different texts" in error(*stream, *few)
    bhpeft(*stream, "--distill", unlabelled, "--out", tmp_path / "stream")
    network = loaded(folder / "run", folder).model.network
    history = History(tmp_path / "stream" / "rounds")
    for id in history.rounds:
        after = history.load(id, network.backbone, tokenizer=network.tokenizer)
        assert after.student is not None and after.student.report.round == id
    assert len(history.rounds) == 2
