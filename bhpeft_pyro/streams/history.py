"""Rounds on disk: a folder for each, which is whole or no round, and never changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from ..base.files import flush_folder, make_folder, naming
from ..errors import BusyError, SaveError
from ..posterior import Posterior, saving
from ..training.report import FitReport

ROUNDS = "rounds"
"""The folder of the rounds in that of a stream."""
_ASIDE, _LOCK = "aside", ".lock"
_NEW = ".new"  # the folder of a round that is not whole yet; the next round takes it
_WAIT = 60  # seconds that `add` waits for another process to finish a round


class History:
    """The rounds of one or more lineages, which may branch.

    A round is a folder named by its id, which `Posterior.load` reads too. It appears whole, and is
    never changed, but that `bhpeft distill` adds a student, and `bhpeft promise` a promise.
    It holds the round's own report; those of earlier rounds are read from the folders beside it. To
    move a round elsewhere, load it and save it there. To roll back or to branch, load an earlier
    round and update it.

    One process at a time writes into a folder (`writing`). Any number may read.

    Args:
        folder: where the rounds are; made when the first is added.

    >>> import tempfile
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer
    >>> history = History(tempfile.mkdtemp())
    >>> first = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> id = history.add(first, name="monday", metrics={"accuracy": 0.75})
    >>> again = history.load(id, tiny_backbone(), tokenizer=tiny_tokenizer())
    >>> again.report.name, history.rounds[id].metrics, history.leaves == [id]
    ('monday', {'accuracy': 0.75}, True)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / _LOCK)

    @classmethod
    def of(cls, run: Path) -> History:
        """The rounds in a folder, or in the folder of a stream."""
        inner = run / ROUNDS
        return cls(inner if inner.is_dir() else run)

    @property
    def rounds(self) -> dict[str, FitReport]:
        """The reports of all rounds here by id, parents before their children, older ones first.

        Raises:
            SaveError: a round is damaged or here twice.
        """
        return {id: report for id, (_, report) in self._ordered().items()}

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each round, by id. (`add` names folders by the id; you may rename them.)"""
        return {id: path for id, (path, _) in self._ordered().items()}

    @property
    def leaves(self) -> list[str]:
        """The rounds that no other round here continues."""
        rounds = self.rounds
        parents = {report.parent for report in rounds.values()}
        return [id for id in rounds if id not in parents]

    @contextmanager
    def writing(self, wait: float = 0) -> Iterator[None]:
        """Be the only process that writes here, until the end of the block.

        The lock is the operating system's, so it ends with its process, however that ends.

        Args:
            wait: seconds to wait for another process that is writing.

        Raises:
            BusyError: another process is writing.
            WriteError: the folder cannot be written to.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with History(folder).writing(), History(folder).writing():
        ...     pass
        Traceback (most recent call last):
        ...
        bhpeft_pyro.errors.BusyError: history: ...
        """
        with naming(self.folder):
            make_folder(self.folder)
            try:
                held = self._lock.acquire(timeout=wait)
            except Timeout:
                raise BusyError(
                    f"history: another process is writing into {self.folder}; wait until it has "
                    "ended, or use another folder"
                ) from None
        with held:
            yield

    def add(
        self, posterior: Posterior, name: str = "", metrics: Mapping[str, float] | None = None
    ) -> str:
        """Save a posterior's last round, with a name and metrics in its report; return its id.

        The posterior itself stays as it was.

        Raises:
            BusyError: another process is writing into the folder, and did not end within a minute.
            SaveError: the round is here already, or it cannot be saved.
            WriteError: the disk is full, or it cannot be written for another reason.
        """
        last = posterior.report
        noted = last.metrics | {str(k): float(v) for k, v in (metrics or {}).items()}
        named = posterior.with_report(name=str(name) or last.name, metrics=noted)
        folder, new = self.folder / last.id, self.folder / _NEW
        with self.writing(_WAIT), naming(folder):
            if saving.exists(folder):
                raise SaveError(f"history: {self.folder} has the round {last.id} already")
            saving.save(named, new, overwrite=True, alone=False)
            os.rename(new, folder)
            flush_folder(self.folder)
        return last.id

    def load(
        self, id: str, backbone: PreTrainedModel | str | None = None, **options: Any
    ) -> Posterior:
        """Load a round by its id, the beginning of it or the name of its folder; the rest is as for
        `Posterior.load`.

        Raises:
            SaveError: no such round, or several.
        """
        folders = self.folders
        return Posterior.load(folders[find(folders, id, self.folder)], backbone, **options)

    def keep_only(self, id: str) -> list[Path]:
        """Move rounds into the folder `aside`, all but a round and those that it continues.

        What is left is a single line of rounds, which `stream` continues. Nothing is deleted: to
        undo it, move the rounds back.

        Args:
            id: of the last round to stay, the beginning of it or the name of its folder.

        Returns:
            Where the others are now.

        Raises:
            BusyError: another process is writing into the folder.
            SaveError: no such round, or several; or `aside` has a folder of that name.
        """
        if not self.folder.is_dir():  # which the lock would make
            find({}, id, self.folder)
        with self.writing():
            rounds = self._ordered()
            kept, above = set[str](), find(self.folders, id, self.folder)
            while above in rounds:
                kept.add(above)
                above = rounds[above][1].parent or ""
            # Children first, so that a kill leaves no round without those before it.
            others = [rounds[other][0] for other in reversed(rounds) if other not in kept]
            moves = {path: self.folder / _ASIDE / path.name for path in others}
            for goal in moves.values():
                if goal.exists():
                    raise SaveError(f"history: {goal} exists already; move it elsewhere first")
            for path, goal in moves.items():
                goal.parent.mkdir(exist_ok=True)
                os.rename(path, goal)
            flush_folder(self.folder)
            return list(moves.values())

    def _ordered(self) -> dict[str, tuple[Path, FitReport]]:
        """Folder and report of each round, parents before their children, older ones first."""
        rounds = self._read()
        sorter = TopologicalSorter[str](
            {id: [r.parent] if r.parent in rounds else [] for id, (_, r) in rounds.items()}
        )
        sorter.prepare()
        ordered = dict[str, tuple[Path, FitReport]]()
        while sorter:
            generation = sorter.get_ready()
            sorter.done(*generation)
            older_first = sorted(generation, key=lambda id: (rounds[id][1].created, id))
            ordered |= {id: rounds[id] for id in older_first}
        return ordered

    def _read(self) -> dict[str, tuple[Path, FitReport]]:
        """By id its folder and report; of copies of a round, that which was written last, which may
        have a student or a promise that the others lack."""
        rounds = dict[str, tuple[Path, FitReport]]()
        for folder in sorted(filter(saving.exists, self.folder.glob("[!.]*"))):
            report = saving.read_report(folder)
            other, _ = rounds.get(report.id, (folder, report))
            if other != folder and report.id in (folder.name, other.name):
                raise SaveError(  # in a stream's own folder, where one hides another round
                    f"history: {other} and {folder} hold the same round, {report.id}; move one of "
                    "them elsewhere"
                )
            if _written(folder) >= _written(other):
                rounds[report.id] = folder, report
        return rounds

    def __repr__(self) -> str:
        return f"History({str(self.folder)!r})"


def _written(folder: Path) -> int:
    """When the posterior in a folder was written, in nanoseconds."""
    return (folder / saving.FILE).stat().st_mtime_ns


def find(rounds: Mapping[str, Path], name: str, folder: Path) -> str:
    """The id of the round whose own folder has a name, or whose id begins with it."""
    name = str(name)
    named = [id for id, path in rounds.items() if path.name == name]
    found = named or [id for id in rounds if name and id.startswith(name)]
    if len(found) != 1:
        ids = [id if path.name == id else f"{id} ({path.name})" for id, path in rounds.items()]
        which = f"{len(found)} rounds" if found else "no round"
        raise SaveError(
            f"round: {which} in {folder} for {name!r:.60}; there are {', '.join(ids) or 'none'}"
        )
    return found[0]
