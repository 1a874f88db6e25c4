"""Posteriors on disk: one file, whole, never a pickle; several processes; files of others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import pytest
import torch
from forks import start, wait
from make_saved import BACKBONE, SAVED, TEXTS
from safetensors import safe_open
from saves import load
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.base import files
from bhpeft_pyro.base.files import write
from bhpeft_pyro.errors import BusyError, SaveError, WriteError
from bhpeft_pyro.posterior import saving
from bhpeft_pyro.posterior.saving import FILE, FORMAT
from bhpeft_pyro.priors.any_prior import earlier_posterior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training.report import FitReport

Rounds = tuple[bh.streams.History, list[str]]


def fit(steps: int = 2, kinds: Any = ()) -> bh.Posterior:
    return bh.fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=steps, progress=False)


@pytest.fixture(scope="module")
def one() -> bh.Posterior:
    return fit()


@pytest.fixture(scope="module")
def two() -> bh.Posterior:
    return fit(3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is on the disk


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("pickle in use")

    posterior = fit(kinds=bh.presets.bh_peft()).update(tiny_examples(12, seed=1))
    for module, functions in (
        (torch, ("save", "load")),
        (pickle, ("dump", "dumps", "load", "loads", "Unpickler", "Pickler")),
    ):
        for function in functions:
            monkeypatch.setattr(module, function, forbidden)
    posterior.save(tmp_path)
    load(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == [FILE]
    with safe_open(tmp_path / FILE, "pt") as file:
        tensors, plain = list(file.keys()), json.loads(file.metadata()["posterior"])
    assert "guides.0.state.loc.lora/query/A" in tensors
    assert plain["format"] == FORMAT and plain["written_by"] == {"bhpeft_pyro": bh.__version__}
    # The frozen backbone is named, not copied.
    assert not [name for name in tensors if any(w in name for w in ("embeddings", "encoder"))]


@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_a_posterior_of_an_earlier_commit_loads_and_can_be_updated(
    name: str, tmp_path: Path
) -> None:
    folder = SAVED / f"format-{FORMAT}-{name}"
    backbone = AutoModel.from_pretrained(BACKBONE)
    posterior = bh.Posterior.load(folder, backbone, tokenizer=tiny_tokenizer())
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()))
    found = posterior.predict(TEXTS, samples=0).probabilities
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(posterior.lineage) == 2
    third = posterior.update({"text": ["w5 w33"], "label": ["no"]}, max_steps=1)
    assert len(third.lineage) == 3
    for last, new in zip(posterior.components, third.components, strict=True):
        prior = earlier_posterior(new.model.prior, "").independent()
        mean = prior.distributions["lora.value.A"].mean
        torch.testing.assert_close(mean, last.guide.means()["lora.value.A"])
    posterior.save(tmp_path)
    again = bh.Posterior.load(tmp_path, backbone, tokenizer=tiny_tokenizer())
    assert torch.equal(again.predict(TEXTS, samples=0).probabilities, found)


def test_a_file_of_an_earlier_version_says_which_one_wrote_it() -> None:
    message = r"path: .* format 4 of bhpeft_pyro 0\.1\.0; .*fit again"
    for reads in (load, saving.read_report):
        with pytest.raises(SaveError, match=message):
            reads(SAVED / "old")


def test_a_header_is_no_larger_than_others_read(
    tmp_path: Path, one: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_LARGEST", 1000)
    with pytest.raises(SaveError, match=r"path: .* bytes.*History"):
        one.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    fit(kinds=None).save(tmp_path)
    other = tiny_backbone()
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight.mul_(1.01)
    with pytest.raises(SaveError, match=r"^backbone: "):
        bh.Posterior.load(tmp_path, other, tokenizer=tiny_tokenizer())
    for place in (tmp_path / FILE, tmp_path / "elsewhere"):
        with pytest.raises(SaveError, match="no saved posterior"):
            bh.Posterior.load(place, tiny_backbone())


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path, one: bh.Posterior) -> None:
    """They were their owner's alone, so nobody could load what lay in a shared folder."""
    before = os.umask(0o002)
    try:
        folder = one.save(tmp_path / "saved")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (folder / FILE).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_was_renamed_or_made_is_on_the_disk(
    tmp_path: Path, one: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder was not flushed: after a power cut the old name could be back."""
    done: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *args: done.append("replace") or replace(*args))
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: (
            done.append("folder" if S_ISDIR(os.fstat(number).st_mode) else "file") or fsync(number)
        ),
    )
    write(tmp_path / "file", b"text")
    assert done == ["file", "replace", "folder"]
    flushed: list[Path] = []
    monkeypatch.setattr(files, "flush_folder", flushed.append)
    one.save(tmp_path / "a" / "b" / "c")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= {*flushed}


def test_earlier_rounds_are_saved_without_most_of_their_steps(tmp_path: Path) -> None:
    posterior = fit()
    last = posterior.report.history[-1]
    steps = [last | {"step": step, "loss": 1 / step} for step in range(1, 401)]
    posterior = posterior.with_report(history=steps)
    posterior = posterior.update(tiny_examples(12, seed=20)).with_report(history=steps)
    again = load(posterior.save(tmp_path / "one"))
    first, before = again.lineage[0], posterior.lineage[0]
    assert len(before.history) == 400 and len(first.history) == 100
    assert first.history[50:] == before.history[350:] and str(first) == str(before)
    assert first.history[0] == before.history[0]
    assert again.report == posterior.report and len(again.report.history) == 400
    third = again.update(tiny_examples(12, seed=21), max_steps=2)
    assert load(third.save(tmp_path / "two")).lineage[0] == first  # once and not again


# Overwriting, crashes, and files of others


def test_overwriting_has_to_be_asked_for_and_leaves_other_files_alone(
    tmp_path: Path, one: bh.Posterior, two: bh.Posterior
) -> None:
    one.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(SaveError, match="overwrite=True"):
        two.save(tmp_path)
    assert names(tmp_path) == [FILE] and (tmp_path / FILE).read_bytes() == before
    mine = ["posterior-backup.safetensors", ".posterior_notes", "posterior.bak", ".posterior"]
    killed = f".{FILE}.new"
    for name in (*mine, killed):
        (tmp_path / name).write_text("kept")
    two.save(tmp_path, overwrite=True)
    assert load(tmp_path).report == two.report
    assert names(tmp_path) == sorted([*mine, FILE])
    one.save(tmp_path, overwrite=True)
    assert load(tmp_path).report == one.report
    file = tmp_path / ".posterior"
    with pytest.raises(WriteError, match="File exists"):
        one.save(file, overwrite=True)
    assert file.read_text() == "kept"


def test_a_crash_while_saving_leaves_the_old_posterior(
    tmp_path: Path, one: bh.Posterior, two: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_source: Any, _target: Any) -> None:
        raise OSError("the disk is full")

    one.save(tmp_path)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(WriteError, match=rf"cannot write {tmp_path}.*: the disk is full"):
        two.save(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert load(tmp_path).report == one.report and names(tmp_path) == [FILE]
    two.save(tmp_path, overwrite=True)
    assert load(tmp_path).report == two.report and names(tmp_path) == [FILE]


# Rounds that are not where their names say


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    history = bh.streams.History(tmp_path / "rounds")
    posterior, ids = fit(), []
    for seed in range(3):
        if ids:
            posterior = posterior.update(tiny_examples(12, seed=10 + seed))
        ids.append(history.add(posterior))
    return history, ids


def test_a_round_copied_over_another_is_refused(rounds: Rounds) -> None:
    """`load` looked for the rounds before it for ever."""
    history, ids = rounds
    first, second, third = (history.folder / round_id for round_id in ids)
    # A new round left out the reports that it took to be in the folder of another.
    last = load(third)
    shutil.rmtree(third)
    shutil.copytree(first, third)
    fourth = last.update(tiny_examples(12, seed=30))
    later = saving.save(fourth, history.folder / fourth.report.id, False, alone=False)
    assert load(later).lineage == fourth.lineage
    shutil.rmtree(first)
    shutil.copytree(second, first)
    for folder in (second, later):
        with pytest.raises(SaveError, match=rf"{ids[0]} holds round {ids[1]}, expected {ids[0]}"):
            load(folder)


def test_a_round_comes_once(tmp_path: Path, one: bh.Posterior) -> None:
    # A round that continues itself, and two that continue each other.
    for name, parent in (("self", "self"), ("a", "b"), ("b", "a")):
        report = FitReport(4, "", bh.FitOptions(), id=name, parent=parent)
        one.replace(lineage=(report,)).save(tmp_path / name)
    for name in ("self", "a", "b"):
        with pytest.raises(SaveError, match=f"continues round {name} twice"):
            load(tmp_path / name)


# Two processes


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Wait before the file gets its name."""
    replace = os.replace

    def waits(source: Any, target: Any) -> None:
        time.sleep(seconds)
        replace(source, target)

    monkeypatch.setattr(os, "replace", waits)


def both(*work: Callable[[], Any]) -> list[int]:
    """The exit codes of children that run beside each other."""
    return [wait(child) for child in [start(function) for function in work]]


def test_a_save_that_began_first_comes_first(
    tmp_path: Path, one: bh.Posterior, two: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begun = tmp_path / "run", tmp_path / "begun"

    def pauses() -> None:
        replace = os.replace

        def waits(source: Any, target: Any) -> None:
            begun.touch()
            time.sleep(0.5)
            replace(source, target)

        monkeypatch.setattr(os, "replace", waits)
        two.save(folder, overwrite=True)

    def follows() -> None:
        while not begun.exists():
            time.sleep(0.01)
        one.save(folder, overwrite=True)

    assert both(pauses, follows) == [0, 0]
    assert load(folder).report == one.report and names(folder) == [FILE]


def test_of_two_first_saves_one_is_told(
    tmp_path: Path, one: bh.Posterior, two: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 0.3)

    def saves(posterior: bh.Posterior) -> None:
        try:
            posterior.save(tmp_path / "new")
        except SaveError as error:
            assert "holds a posterior already" in str(error)
            os._exit(3)

    codes = both(lambda: saves(one), lambda: saves(two))
    assert sorted(codes) == [0, 3]
    assert load(tmp_path / "new").report == (one, two)[codes.index(0)].report


def test_a_save_does_not_wait_for_ever(
    tmp_path: Path, one: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAIT", 0.2)
    with (
        files.alone(tmp_path / FILE),
        pytest.raises(BusyError, match=r"another process .* writing .* for 0\.2 seconds"),
    ):
        one.save(tmp_path)
    one.save(tmp_path)


def test_who_is_reading_goes_on_with_the_old_file(
    tmp_path: Path, one: bh.Posterior, two: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.save(tmp_path)
    fstat = os.fstat

    def saved_meanwhile(number: int) -> os.stat_result:
        monkeypatch.undo()
        two.save(tmp_path, overwrite=True)
        return fstat(number)

    monkeypatch.setattr(os, "fstat", saved_meanwhile)
    assert load(tmp_path).report == one.report
    assert load(tmp_path).report == two.report
