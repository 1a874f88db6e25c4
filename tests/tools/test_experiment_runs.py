"""The runner: files that survive a kill and are shared by processes, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from bhpeft_pyro.errors import ConfigError
from tools.experiments.__main__ import app, experiments
from tools.experiments.budgets import BUDGETS
from tools.experiments.methods import method
from tools.experiments.runs import Experiment, Given, results, selected
from tools.experiments.tables import Table

GRID = ("tasks", "rows", "passes", "promise", "sets", "novelty")


def given(out: Path, **setting: Any) -> Given:
    return Given(setting, lambda: pytest.fail("not loaded"), "tiny", None, out)


def counting(run: Any) -> Experiment:
    def tables(results: Any) -> list[Table]:
        return []

    return Experiment("Which numbers?", lambda setting, seeds: [], run, tables, {})


def test_what_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[int] = []

    def run(of: Given, number: int) -> dict[str, int]:
        calls.append(number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return {"number": number}

    runs = [(0,), (1,), (2,)]
    with pytest.raises(KeyboardInterrupt):
        results(counting(run), given(tmp_path), runs)
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]  # nothing of what died
    for _ in range(2):
        done = results(counting(run), given(tmp_path), runs)
    assert [result["number"] for result in done] == [0, 1, 2]
    assert calls == [0, 1, 1, 2]


def test_what_another_process_is_at_is_left_to_it_and_done_if_that_dies(tmp_path: Path) -> None:
    done: list[int] = []
    other = FileLock(tmp_path / ".1.json.claim")

    def run(of: Given, number: int) -> dict[str, int]:
        with pytest.raises(Timeout):  # nobody else can claim what is being made
            FileLock(tmp_path / f".{number}.json.claim").acquire(blocking=False)
        done.append(number)
        if number == 2:
            other.release()  # the other process is gone, with nothing done
        return {"number": number}

    with other:
        results(counting(run), given(tmp_path), [(0,), (1,), (2,)])
    assert done == [0, 2, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]


def test_files_of_another_setting_are_refused(tmp_path: Path) -> None:
    experiment = counting(lambda of, number: {"number": number})
    results(experiment, given(tmp_path, rows=5), [(0,)])
    with pytest.raises(ConfigError, match="was run with rows 5, not 6; take another folder"):
        results(experiment, given(tmp_path, rows=6), [(0,), (1,)])
    (only,) = results(experiment, given(tmp_path, rows=None), [(0,)])  # for a run to decide
    assert only["rows"] == 5 and {"commit", "version", "backbone"} <= only.keys()


def test_runs_are_chosen_by_what_their_parts_are() -> None:
    runs: list[Any] = [(task, *pair) for task in "ab" for pair in (("p", "x"), ("q", "x"))]
    assert selected(runs, ["a", "p, x"]) == [("a", "p", "x")]
    assert selected(runs, ["a", "b"]) == selected(runs, []) == runs
    with pytest.raises(ConfigError, match="--only: unknown c; known: a"):
        selected(runs, ["c"])


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_every_experiment_lists_its_runs(budget: Any) -> None:
    for name, experiment in experiments(budget).items():
        runs = experiment.runs(experiment.setting, 2)
        assert len(runs) == len(set(runs)) > 0, name
    assert {name for names in budget.plan.values() for name in names} <= budget.tasks.keys()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions share their runs."""
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("name", GRID)
def test_the_command_writes_tables(name: str, shared: Path) -> None:
    words = [name, "--budget", "tiny", "--seeds", "1", "--out", str(shared)]
    words += ["--set", "search=1", "--set", "steps=2"]
    words += ["--set", 'methods=["head only, deterministic"]']
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert {path.suffix for path in (shared / f"{name}-tables").iterdir()} == {".md", ".csv"}
    assert "| head only, deterministic" in result.output


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for words, message in (
        (["task"], "'task' is unknown"),
        (["tasks"], "--data"),
        (["tasks", "--budget", "tiny", "--only", "tale"], "unknown tale"),
        (["tasks", "--budget", "tiny", "--set", "step=3"], "--set: unknown step"),
        (["circle", "--budget", "tiny"], "--data"),
        (["cost", "--budget", "tiny", "--backbone", "random:2x65"], "random:LAYERSxWIDTH"),
    ):
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "o")])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
    with pytest.raises(ConfigError, match="'hybrid, magic' is unknown"):
        method("hybrid, magic")
