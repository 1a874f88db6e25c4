"""Rounds on disk: a folder for each, written at once and never changed.

Going on with a stream after the last of its rounds that was saved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.tree import Tree
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, SaveError
from ..inference.report import FitReport
from ..model.head import Head, OwnHead
from ..model.model import Model
from ..posterior import io
from ..posterior.posterior import Posterior
from ..priors import PriorLike
from .update import has_learnt

__all__ = [
    "History",
    "check_same",
    "resume",
]


_PARTIAL = ".partial"
_SHOWN = 4  # metrics a line


class History:
    """The rounds of one or more lineages, a tree: `rich.print(history)` shows it.

    A round is a folder named by its id, which `Posterior.load` reads too. It appears whole (it is
    written under another name, then renamed) and stays as it is. It holds its own report, and
    those of earlier rounds are read from the folders beside it: to take one elsewhere, load it and
    save it there. To roll back, or to branch, load an earlier round and update it.

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

    @property
    def rounds(self) -> dict[str, FitReport]:
        """The reports of all rounds here by id, parents before their children, older ones first.

        Raises:
            SaveError: a round is damaged.
        """
        reports = [report for _, report in self._read()]
        reports.sort(key=lambda report: (report.created, report.id))
        children: dict[str | None, list[FitReport]] = {}
        here = {report.id for report in reports}
        for report in reports:
            children.setdefault(report.parent if report.parent in here else None, []).append(report)
        found: dict[str, FitReport] = {}
        generation = children.get(None, [])
        while generation:
            found |= {report.id: report for report in generation}
            generation = [c for report in generation for c in children.get(report.id, [])]
        return found

    @property
    def folders(self) -> dict[str, Path]:
        """Where each of the rounds is, by id; `add` takes the id for the folder's name too."""
        return {report.id: path for path, report in self._read()}

    @property
    def leaves(self) -> list[str]:
        """The rounds that no other goes on from."""
        rounds = self.rounds
        parents = {report.parent for report in rounds.values()}
        return [id for id in rounds if id not in parents]

    def add(
        self, posterior: Posterior, name: str = "", metrics: Mapping[str, float] | None = None
    ) -> str:
        """Save a posterior's last round.

        Args:
            posterior: the posterior; the two below are noted in its report.
            name: what to call the round.
            metrics: what to remember of it.

        Returns:
            The round's id.

        Raises:
            SaveError: the round is here already, or it cannot be saved.
        """
        report = posterior.report
        folder = self.folder / report.id
        if folder.exists():
            raise SaveError(f"history: {self.folder} has the round {report.id} already")
        report.name = name or report.name
        report.metrics |= metrics or {}
        partial = self.folder / f"{report.id}{_PARTIAL}"
        io.save(posterior, partial, overwrite=True, alone=False)
        os.rename(partial, folder)
        io.keep_names(self.folder)
        return report.id

    def load(
        self,
        id: str,
        backbone: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prior: PriorLike | None = None,
    ) -> Posterior:
        """A round, by its id or the beginning of it; the rest is as for `Posterior.load`.

        Raises:
            SaveError: no such round, or several.
        """
        found = [known for known in self.rounds if known.startswith(id)]
        if len(found) != 1:
            which = f"{len(found)} rounds" if found else "no round"
            raise SaveError(
                f"id: {which} in {self.folder} begin with {id!r}; there are "
                f"{', '.join(self.rounds) or 'none'}"
            )
        return Posterior.load(self.folders[found[0]], backbone, tokenizer=tokenizer, prior=prior)

    def clean(self) -> None:
        """Remove what rounds that were being written when their process was killed have left."""
        for path in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(path)

    def _read(self) -> list[tuple[Path, FitReport]]:
        return [
            (path, io.read_report(path))
            for path in self.folder.glob("*")
            if io.exists(path) and path.suffix != _PARTIAL
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        root = Tree(str(self.folder))
        branches: dict[str | None, Tree] = {}
        folders = self.folders
        for id, report in self.rounds.items():
            line = _line(report, folders[id].name)
            branches[id] = branches.get(report.parent, root).add(line)
        yield root


def _line(report: FitReport, folder: str) -> str:
    parts = [f"[bold]{report.id}[/bold]"]
    if folder != report.id:
        parts.append(f"in {escape(folder)}")
    parts += [escape(report.name), f"{report.examples} examples"]
    if report.temperature != 1:
        parts.append(f"temperature {report.temperature:g}")
    if report.keep != 1:
        parts.append(f"keep {report.keep}")
    if report.floor:
        parts.append(f"floor {report.floor:g}")
    if report.projection is not None:
        parts.append(f"another guide, {report.projection:.2f} nats away")
    parts += [f"{name} {value:.3f}" for name, value in list(report.metrics.items())[:_SHOWN]]
    return "  ".join(filter(None, parts))


def resume(history: History, model: Model) -> Posterior | None:
    """The last posterior, if there are rounds.

    Raises:
        ConfigError: they branch, or are of another model.
    """
    leaves = history.leaves
    if len(leaves) > 1:
        raise ConfigError(
            f"folder: {history.folder} holds {len(leaves)} branches ({', '.join(leaves)}), "
            "expected a single line of rounds"
        )
    if not leaves:
        return None
    network = model.network
    last = history.load(leaves[0], network.backbone, tokenizer=network.tokenizer, prior=model.prior)
    there = last.model
    for what, given, found in (
        ("PEFT weights", network.kinds, there.network.kinds),
        ("head", _apart(network.head), _apart(there.network.head)),
        ("likelihood", repr(model.likelihood), repr(there.likelihood)),
    ):
        if given != found:
            raise ConfigError(
                f"model: {history.folder} holds rounds of other {what}: {found}, not {given}; "
                "expected the same model, or another folder"
            )
    return last


def _apart(head: Head | OwnHead) -> object:
    """A head without the number of its outputs, which new labels add to."""
    return replace(head, outputs=2) if isinstance(head, Head) else head


def check_same(posterior: Posterior, number: int, name: str, data: object) -> None:
    """Whether a round that is done is of this very batch.

    Raises:
        ConfigError: it is of another.
    """
    report = posterior.lineage[number]
    examples = posterior.encode(data)
    if report.name != name or not has_learnt(report, examples):
        raise ConfigError(
            f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
            f"{number + 1} is {name!r}" + (" with other data" if report.name == name else "")
        )
