"""Result files: one for each run, whole or not at all, from which every table is made."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from bhpeft_pyro import __version__
from bhpeft_pyro.base.files import write
from bhpeft_pyro.errors import ConfigError

__all__ = [
    "Run",
    "check_names",
    "check_setting",
    "commit",
    "complete",
    "file_of",
    "load",
    "run_all",
]

Run = tuple[object, ...]


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
    """Make the results that are missing. After a kill, call it again.

    Processes with the same folder share the work. A run that another process has claimed is left to
    it, and waited for at the end.

    Args:
        out: the folder of result files.
        runs: what tells one run from another, as arguments of `result`.
        result: does a run; returns plain data, or the file's content.
        ending: of the files' names.
    """
    out.mkdir(parents=True, exist_ok=True)

    def done(run: Run, wait: bool) -> bool:
        """Write the file unless it is there; False if another process holds the claim."""
        path = file_of(out, run, ending)
        # The operating system's lock ends with its process, however that ends.
        claim = FileLock(path.with_name(f".{path.name}.claim"), blocking=wait)
        try:
            claim.acquire()
        except Timeout:
            return False
        try:
            if not path.exists():
                made = result(*run)
                content = made if isinstance(made, bytes) else json.dumps(made, indent=1).encode()
                write(path, content)
        finally:
            claim.release()
            Path(claim.lock_file).unlink(missing_ok=True)
        return True

    console = Console(stderr=True)
    todo = [run for run in runs if not file_of(out, run, ending).exists()]
    left = [run for run in track(todo, "fitting", console=console) if not done(run, wait=False)]
    if left:
        for run in track(left, "waiting for another process", console=console):
            done(run, wait=True)


def check_setting(path: Path, facts: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """See that a result file is of this very setting, so that no others are mixed in.

    Raises:
        ConfigError: it is of another setting.

    >>> check_setting(Path("news.0.json"), {"rows": 400, "seed": 0}, {"rows": 400})
    """
    for name, value in expected.items():
        if facts.get(name) != value:
            raise ConfigError(
                f"--out: {path} was run with {name} {facts.get(name)}, not {value}; take another "
                "folder"
            )


def run_all(
    out: Path,
    runs: Sequence[Run],
    setting: Mapping[str, Any],
    result: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """`complete`, then `load`; each result with the setting, the version and the commit.

    Raises:
        ConfigError: a file that is there is of another setting.
    """
    for run in runs:
        if (path := file_of(out, run)).exists():
            check_setting(path, json.loads(path.read_text()), setting)
    facts = {"version": __version__, "commit": commit(), **setting}  # of the code as it is now
    complete(out, runs, lambda *run: facts | result(*run))
    return load(out, runs)


def load(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The results that are there, in the order of `runs`."""
    files = (file_of(out, run) for run in runs)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def check_names(option: str, names: Iterable[str], there: Iterable[str]) -> None:
    """Refuse names on the command line that are not there.

    Raises:
        ConfigError: with those that are.
    """
    if unknown := set(names) - set(there):
        names = ", ".join(sorted(unknown))
        raise ConfigError(f"--{option}: unknown {names}; known: {', '.join(there)}")


@cache
def commit() -> str:
    """The commit of the code that runs, "+" if it was changed since; else the version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return described.stdout.strip()
