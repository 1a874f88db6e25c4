"""Rounds on disk: a folder for each, written atomically and never changed."""

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
from ..files import keep_names
from ..inference.report import FitReport
from ..model.model import Model
from ..posterior import io
from ..posterior.posterior import Posterior
from ..priors import PriorLike
from .update import has_learnt

__all__ = ["History", "check_same", "resume"]

_PARTIAL = ".partial"
_SHOWN = 4  # metrics a line


class History:
    """The rounds of one or more lineages, a tree: `rich.print(history)` shows it.

    A round is a folder named by its id, which `Posterior.load` reads too. It is written under
    another name and then renamed, so it appears whole, and it is never changed. It holds its own
    report; those of earlier rounds are read from the folders beside it. To move a round elsewhere,
    load it and save it there. To roll back or to branch, load an earlier round and update it.

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
        reports = {report.id: report for _, report in self._read()}

        def age(report: FitReport) -> tuple[int, str, str]:
            generation, parent = 0, reports.get(report.parent or "")
            while parent is not None:
                generation, parent = generation + 1, reports.get(parent.parent or "")
            return generation, report.created, report.id

        return {report.id: report for report in sorted(reports.values(), key=age)}

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each round, by id. (`add` names folders by the id; you may rename them.)"""
        return {report.id: path for path, report in self._read()}

    @property
    def leaves(self) -> list[str]:
        """The rounds that no other round here continues."""
        rounds = self.rounds
        parents = {report.parent for report in rounds.values()}
        return [id for id in rounds if id not in parents]

    def add(
        self, posterior: Posterior, name: str = "", metrics: Mapping[str, float] | None = None
    ) -> str:
        """Save a posterior's last round, with a name and metrics in its report; return its id.

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
        keep_names(self.folder)
        return report.id

    def load(
        self,
        id: str,
        backbone: PreTrainedModel | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prior: PriorLike | None = None,
        device: str = "auto",
    ) -> Posterior:
        """Load a round by its id or the beginning of it; the rest is as for `Posterior.load`.

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
        return Posterior.load(
            self.folders[found[0]], backbone, tokenizer=tokenizer, prior=prior, device=device
        )

    def clean(self) -> None:
        """Remove rounds that were half written when their process was killed."""
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
    """The last posterior of a single line of rounds, if there are any.

    Raises:
        ConfigError: the rounds branch, or belong to another model.
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
        ("head", replace(network.head, outputs=2), replace(there.network.head, outputs=2)),
        ("likelihood", repr(model.likelihood), repr(there.likelihood)),
    ):
        if given != found:
            raise ConfigError(
                f"model: {history.folder} holds rounds of other {what}: {found}, not {given}; "
                "use the same model, or another folder"
            )
    return last


def check_same(posterior: Posterior, number: int, name: str, data: object) -> None:
    """Check that a finished round learnt this very batch.

    Raises:
        ConfigError: it learnt another.
    """
    report = posterior.lineage[number]
    examples = posterior.encode(data)
    if report.name != name or not has_learnt(report, examples):
        raise ConfigError(
            f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
            f"{number + 1} is {name!r}" + (" with other data" if report.name == name else "")
        )
