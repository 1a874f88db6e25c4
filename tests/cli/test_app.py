"""The program: errors in one line, exit codes, what is printed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from unittest.mock import Mock

from program import ONE, bhpeft, error, usage_error, write_csv

import bhpeft_pyro as bh
from bhpeft_pyro.errors import FitError


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
    page = tmp_path / "x.html"
    for arguments, message in (
        (("fit", tmp_path / "no.csv", "--out", out), "no such file"),
        (("fit", sheet, "--out", out), "spreadsheets need|cannot be read"),
        (("fit", tmp_path / "no.xlsx", "--out", out), "no.xlsx: no such file"),
        (("evaluate", tmp_path / "none", train), "there is no folder .*none"),
        (("promise", train, train), "run: there is no folder .*train.csv"),
        ((*fit, "--validation", "no.csv"), "no.csv: no such file"),
        (
            (*fit, "--guide", "normal", "--batch-size", 6),
            "batch_size=6 must be a multiple of 4",
        ),
        ((*fit, "--label-column", "no"), "--label-column"),
        ((*fit, "--patience", 2, "--validation", 0), "needs validation"),
        (("fit", train, "--out", run), "--overwrite"),
        (("fit", train, "--out", train), "is a file"),
        (("fit", train, "--out", out, "--backbone", tmp_path / "none"), "'smollm2' come from PyPI"),
        (("predict", tmp_path, train), "no saved posterior"),
        (("predict", run, train, "--out", train), "is the data"),
        (("predict", run, train, "--out", "x.parquet"), "should end in"),
        (("predict", run, train, "--flag", 0, "--out", tmp_path / "y.csv"), "flags no row"),
        (("evaluate", run, folder / "new.csv"), "column 'label' is missing.*id, text"),
        (("fit", lists, "--task", "classes", "--out", out), r"line 1: \['a'\] is a list; expected"),
        (("report", run, partly, "--out", page), "partly.csv, .* row 3: the label is"),
        (("fit", empty, "--out", out), "empty.csv: there are no rows"),
        (("evaluate", run, empty), "empty.csv: there are no rows"),
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
        (("predict", run, train, "--by", "x"), "'x' is not one of"),
    ):
        assert re.search(message, usage_error(*arguments)), arguments
    assert not out.exists() and not (tmp_path / "y.csv").exists()


def test_a_folder_that_cannot_be_written_into_is_refused_before_any_work(
    folder, tmp_path, monkeypatch
):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("bhpeft_pyro.cli.saved.TemporaryFile", refuse)
    page = ("report", folder / "run", "--out", tmp_path / "page.html")
    for command in (("fit", folder / "train.csv", "--out", tmp_path / "a" / "b"), page):
        assert "cannot write into" in (said := error(*command)) and "Permission denied" in said


def test_other_failures_have_exit_code_1(folder, tmp_path, monkeypatch):
    fit = ("fit", folder / "train.csv", "--backbone", folder / "tiny", *ONE)
    monkeypatch.setattr(bh.Posterior, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert "full" in error(*fit, "--out", tmp_path / "run", code=1)
    evaluate = ("evaluate", folder / "run", folder / "train.csv")
    for few in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory\n\n")):
        monkeypatch.setattr(bh.Posterior, "predict", Mock(side_effect=few))
        assert "not enough memory" in error(*evaluate, code=1)
    monkeypatch.setattr(bh.Posterior, "predict", lambda *_, **__: 1 / 0)
    result = bhpeft(*evaluate, code=1)
    assert isinstance(result.exception, ZeroDivisionError)  # a bug keeps its traceback
    monkeypatch.undo()

    def diverge(*_):
        raise FitError("not finite")

    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", diverge)
    assert "not finite" in error(*fit, "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_enough_is_no_error(folder, monkeypatch):
    closed = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr("typer.echo", Mock(side_effect=closed))  # as under `| head`
    assert bhpeft("history", folder / "run", "--json", code=1).stderr == ""


def test_json_has_no_word_for_infinity(capsys):
    from bhpeft_pyro.cli.screen import print_json

    print_json({"nll": math.inf, "held_out": {"mse": math.nan, "n": 3}})
    assert json.loads(capsys.readouterr().out) == {"nll": None, "held_out": {"mse": None, "n": 3}}
