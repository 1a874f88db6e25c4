"""Result files: one a run, whole or not at all, from which every table is made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import sem

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.posterior.io import write

__all__ = ["Run", "cell", "check_setting", "complete", "file_of", "known", "load", "show"]

Run = tuple[object, ...]

_WIDTH = 300  # a line of Markdown may not be broken, however narrow the terminal is


def file_of(out: Path, run: Run, ending: str = "json") -> Path:
    """Where a run's result goes.

    >>> file_of(Path("runs"), ("news", 0, "head only, Bayesian")).name
    'news.0.head-only-Bayesian.json'
    """
    return out / ".".join([*(re.sub(r"[^\w.]+", "-", str(part)) for part in run), ending])


def complete(
    out: Path,
    runs: Iterable[Run],
    result: Callable[..., dict[str, Any] | bytes],
    ending: str = "json",
) -> None:
    """Make the results that are missing, so that what was killed goes on where it stopped.

    Processes that share the folder share the runs out. What another one is at is left to it, and
    waited for in the end.

    Args:
        out: the folder of result files.
        runs: what tells one run from another, as arguments of `result`.
        result: does a run; plain data, or the file's content.
        ending: of the files' names.
    """
    out.mkdir(parents=True, exist_ok=True)

    def done(run: Run, wait: bool) -> bool:
        return _claimed(file_of(out, run, ending), lambda: _content(result(*run)), wait)

    console = Console(stderr=True)
    todo = [run for run in runs if not file_of(out, run, ending).exists()]
    left = [run for run in track(todo, "fitting", console=console) if not done(run, wait=False)]
    if left:
        for run in track(left, "waiting for another process", console=console):
            done(run, wait=True)


def _claimed(path: Path, content: Callable[[], bytes], wait: bool) -> bool:
    """Write a file that is not there; False if another process is at it, and is not waited for.

    A claim is a lock of the operating system's, which ends with its process, however that ends.
    """
    claim = FileLock(path.with_name(f".{path.name}.lock"), blocking=wait)
    try:
        held = claim.acquire()
    except Timeout:
        return False
    try:
        with held:
            if not path.exists():
                write(path, content())
    finally:
        Path(claim.lock_file).unlink(missing_ok=True)
    return True


def _content(result: dict[str, Any] | bytes) -> bytes:
    return result if isinstance(result, bytes) else json.dumps(result, indent=1).encode()


def check_setting(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """See that a result file is of this very setting, as others would be mixed in.

    Raises:
        ConfigError: it is of another one.

    >>> check_setting(Path("news.0.json"), {"rows": 400, "seed": 0}, {"rows": 400})
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise ConfigError(
                f"--out: {path} was run with {name} {found.get(name)}, not {value}; take another "
                "folder"
            )


def load(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The results that are there, in the order of `runs`."""
    files = (file_of(out, run) for run in runs)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def known(names: Sequence[str], there: Iterable[str]) -> None:
    """Refuse names on the command line that are not there.

    Raises:
        BadParameter: with those that are.
    """
    if unknown := set(names) - set(there):
        raise typer.BadParameter(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(there)}"
        )


def cell(values: Sequence[float]) -> str:
    """Mean and standard error over seeds.

    >>> cell([0.5, 1.5, 2.5]), cell([0.5])
    ('1.500 ± 0.577', '0.500')
    """
    error = f" ± {sem(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def show(table: Table) -> None:
    """Print a table."""
    Console(width=_WIDTH).print(table)
