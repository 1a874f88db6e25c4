"""Several processes, folders that were copied, and files that are not the package's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import start, wait
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.base import files
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.posterior import saving as io
from bhpeft_pyro.testing import tiny_examples, tiny_model
from bhpeft_pyro.training.report import FitReport


def fit(steps: int = 2) -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=steps, progress=False)


@pytest.fixture
def rounds(tmp_path: Path) -> tuple[bh.streams.History, list[str]]:
    history = bh.streams.History(tmp_path / "rounds")
    posterior, ids = fit(), []
    for seed in range(3):
        if ids:
            posterior = posterior.update(tiny_examples(12, seed=10 + seed))
        ids.append(history.add(posterior))
    return history, ids


# Rounds that are not where their names say


def test_a_round_copied_over_another_is_refused(
    rounds: tuple[bh.streams.History, list[str]],
) -> None:
    """`load` looked for the rounds before it for ever."""
    history, ids = rounds
    first, second, third = (history.folder / each for each in ids)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    for folder in (second, third):
        with pytest.raises(SaveError, match=rf"{ids[0]} holds round {ids[1]}, expected {ids[0]}"):
            load(folder)


def test_a_round_comes_once(rounds: tuple[bh.streams.History, list[str]]) -> None:
    history, ids = rounds
    last = load(history.folder / ids[2])
    # A round that continues itself, and two that continue each other.
    own = last.replace(lineage=(FitReport(4, "", bh.FitOptions(), id="own", parent="own"),))
    own.save(history.folder / "own")
    for one, other in (("a", "b"), ("b", "a")):
        report = FitReport(4, "", bh.FitOptions(), id=one, parent=other)
        last.replace(lineage=(report,)).save(history.folder / one)
    for name, twice in (("own", "own"), ("a", "a"), ("b", "b")):
        with pytest.raises(SaveError, match=f"continues round {twice} twice"):
            load(history.folder / name)


def test_a_new_round_does_not_rely_on_a_folder_of_another(
    rounds: tuple[bh.streams.History, list[str]],
) -> None:
    """It left out the reports that it took to be in that folder."""
    history, ids = rounds
    last = load(history.folder / ids[2])
    shutil.rmtree(history.folder / ids[2])
    shutil.copytree(history.folder / ids[0], history.folder / ids[2])
    fourth = last.update(tiny_examples(12, seed=30))
    saved = io.save(fourth, history.folder / fourth.report.id, False, alone=False)
    assert load(saved).lineage == fourth.lineage


# Files of others


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """`posterior-*.safetensors` and `.posterior*` were removed, whoever wrote them."""
    posterior = fit()
    posterior.save(tmp_path)
    mine = ["posterior-backup.safetensors", ".posterior_notes", "posterior.json.bak", ".posterior"]
    left = [".posterior.json.0123456789abcdef", "posterior-0123456789abcdef.safetensors"]
    for name in mine + left:
        (tmp_path / name).write_text("kept")
    fit(3).save(tmp_path, overwrite=True)
    there = {path.name for path in tmp_path.iterdir()}
    assert there >= {*mine} and not there & {*left} and len(there) == len(mine) + 2


# Two processes


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Wait between the tensors and the index."""
    write = io.write

    def waits(path: Path, data: bytes) -> None:
        write(path, data)
        if path.suffix == ".safetensors":
            time.sleep(seconds)

    monkeypatch.setattr(io, "write", waits)


def both(*work: Callable[[], Any], apart: float = 0.0) -> list[int]:
    """The exit codes of children that run beside each other."""
    children = []
    for each in work:
        children.append(start(each))
        time.sleep(apart)
    return [wait(child) for child in children]


def test_a_pause_between_tensors_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other save removed the tensors of this one, whose index came last: nothing was left."""
    one, two = fit(), fit(3)
    one.save(tmp_path)

    def pauses() -> None:
        slow(monkeypatch, 0.5)
        two.save(tmp_path, overwrite=True)

    codes = both(pauses, lambda: one.save(tmp_path, overwrite=True), apart=0.2)
    assert codes == [0, 0]
    assert load(tmp_path).report == one.report and len(list(tmp_path.iterdir())) == 2


def test_of_two_first_saves_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posteriors = [fit(), fit(3)]
    slow(monkeypatch, 0.3)

    def saves(posterior: bh.Posterior) -> None:
        try:
            posterior.save(tmp_path / "new")
        except SaveError as error:
            assert "holds a posterior already" in str(error)
            os._exit(3)

    codes = both(lambda: saves(posteriors[0]), lambda: saves(posteriors[1]))
    assert sorted(codes) == [0, 3]
    assert load(tmp_path / "new").report == posteriors[codes.index(0)].report


def test_a_save_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAIT", 0.2)
    posterior = fit()
    with (
        files.alone_in(tmp_path),
        pytest.raises(SaveError, match=r"another process .* saving to .* for 0\.2 seconds"),
    ):
        posterior.save(tmp_path)
    posterior.save(tmp_path)


def test_a_reader_reads_the_new_index_if_the_old_tensors_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fit(), fit(3)
    one.save(tmp_path)
    read, calls = io.read_index, []

    def saved_meanwhile(folder: Path) -> Any:
        content = read(folder)
        if not calls:
            calls.append(1)
            two.save(tmp_path, overwrite=True)
        return content

    monkeypatch.setattr(io, "read_index", saved_meanwhile)
    assert load(tmp_path).report == two.report


def test_the_folders_above_a_new_one_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "keep_names", flushed.append)
    fit().save(tmp_path / "a" / "b" / "c")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= {*flushed}


# The size of a save by itself


def test_earlier_rounds_are_saved_without_most_of_their_steps(tmp_path: Path) -> None:
    posterior = fit()
    last = posterior.report.history[-1]
    posterior.report.history = [last | {"step": step, "loss": 1 / step} for step in range(1, 401)]
    posterior = posterior.update(tiny_examples(12, seed=20))
    posterior.report.history = posterior.lineage[0].history[:]
    again = load(posterior.save(tmp_path / "one"))
    first, before = again.lineage[0], posterior.lineage[0]
    assert len(before.history) == 400 and len(first.history) == 100
    assert first.history[50:] == before.history[350:] and str(first) == str(before)
    assert first.history[0] == before.history[0]
    assert again.report == posterior.report and len(again.report.history) == 400
    third = again.update(tiny_examples(12, seed=21), max_steps=2)
    assert load(third.save(tmp_path / "two")).lineage[0] == first  # once and not again
