"""An experiment is a function of a run, whose result is one file, whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from bhpeft_pyro import __version__
from bhpeft_pyro.base.files import write
from bhpeft_pyro.errors import ConfigError

from .job import Load
from .tables import Table

__all__ = [
    "Experiment",
    "Given",
    "Run",
    "check_setting",
    "commit",
    "file_of",
    "load",
    "results",
    "selected",
]

Run = tuple[object, ...]
"""What tells one run from another: its arguments, in the order in which its file is named."""
Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What all runs of a command have in common.

    Attributes:
        setting: sizes and choices, by name.
        load: makes a new copy of the frozen transformer.
        backbone: its name.
        data: the folder of JSON lines files; None if there are none to read.
        out: the folder of result files.
    """

    setting: Setting
    load: Load
    backbone: str
    data: Path | None
    out: Path


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        about: the question.
        runs: from the setting and the number of seeds to all runs.
        run: does one: from what is given and the run to plain data, or to the content of a file.
        tables: from the results to what is shown.
        setting: sizes and choices with their defaults; None for those that a run decides.
        seeds: by default.
        read: from a result file to a result with `facts`, the plain data to be compared.
        ending: of result files.
    """

    about: str
    runs: Callable[[Setting, int], Sequence[Run]]
    run: Callable[..., dict[str, Any] | bytes]
    tables: Callable[[Sequence[Any]], Sequence[Table]]
    setting: Setting
    seeds: int = 1
    read: Callable[[Path], Any] = lambda path: json.loads(path.read_text())
    ending: str = "json"


def results(experiment: Experiment, given: Given, runs: Sequence[Run]) -> list[Any]:
    """Do the runs that are missing, and read all. After a kill, call it again.

    Processes with the same folder share the work. A run that another process has claimed is left
    to it, and waited for at the end.

    Raises:
        ConfigError: a file that is there is of another setting.
    """
    files = {run: file_of(given.out, run, experiment.ending) for run in runs}
    for path in filter(Path.exists, files.values()):
        stored = experiment.read(path)
        check_setting(path, getattr(stored, "facts", stored), given)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"version": __version__, "commit": commit(), **given.setting}

    def done(run: Run, wait: bool) -> bool:
        """Write the file unless it is there; False if another process holds the claim."""
        # The operating system's lock ends with its process, however that ends.
        claim = FileLock(files[run].with_name(f".{files[run].name}.claim"), blocking=wait)
        try:
            claim.acquire()
        except Timeout:
            return False
        try:
            if not files[run].exists():
                result = experiment.run(given, *run)
                if not isinstance(result, bytes):
                    whole = {**facts, "backbone": given.backbone, **result}
                    result = json.dumps(whole, indent=1).encode()
                write(files[run], result)
        finally:
            claim.release()
            Path(claim.lock_file).unlink(missing_ok=True)
        return True

    console = Console(stderr=True)
    missing = [run for run, path in files.items() if not path.exists()]
    left = [run for run in track(missing, "fitting", console=console) if not done(run, wait=False)]
    if left:
        for run in track(left, "waiting for another process", console=console):
            done(run, wait=True)
    return [experiment.read(path) for path in files.values()]


def file_of(out: Path, run: Run, ending: str = "json") -> Path:
    """Where a run's result goes.

    >>> file_of(Path("runs"), ("news", 0, "head only, Bayesian")).name
    'news.0.head-only-Bayesian.json'
    """
    return out / ".".join([*(re.sub(r"[^\w.]+", "-", str(part)) for part in run), ending])


def check_setting(path: Path, facts: Mapping[str, Any], given: Given) -> None:
    """See that a result file is of this very setting, so that no others are mixed in.

    Raises:
        ConfigError: it is of another setting.
    """
    for name, value in {**given.setting, "backbone": given.backbone}.items():
        if value is not None and name in facts and facts[name] != value:
            raise ConfigError(
                f"--out: {path} was run with {name} {facts[name]}, not {value}; take another folder"
            )


def selected(runs: Sequence[Run], only: Iterable[str]) -> list[Run]:
    """The runs with these values: of each part that one of them names, or of two beside each other.

    Raises:
        ConfigError: no run has one of them.

    >>> selected([("news", "LoRA", 0), ("news", "MAM", 0), ("films", "LoRA", 0)], ["news", "LoRA"])
    [('news', 'LoRA', 0)]
    """
    names = [[*map(str, run), *(f"{a}, {b}" for a, b in pairwise(run))] for run in runs]
    parts = [set(only) & {*values} for values in zip_longest(*names)]
    if unknown := set(only) - set().union(*parts):
        known = ", ".join(sorted({name for line in names for name in line}))
        raise ConfigError(f"--only: unknown {', '.join(sorted(unknown))}; known: {known}")
    return [
        run
        for run, line in zip(runs, names, strict=True)
        if all(not part or name in part for part, name in zip(parts, line, strict=False))
    ]


def load(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The JSON results that are there, in the order of `runs`."""
    files = (file_of(out, run) for run in runs)
    return [json.loads(file.read_text()) for file in files if file.exists()]


@cache
def commit() -> str:
    """The commit of the code that runs, "+" if it was changed since; else the version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return described.stdout.strip()
