"""Going on with a stream after the last of its rounds that was saved."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError
from ..head import Head, OwnHead
from ..model import Model
from ..posterior import Posterior
from .history import History
from .update import has_learnt

__all__ = ["check_same", "resume"]


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
    examples = posterior.text.encode(posterior.model, data, labelled=True)
    if report.name != name or not has_learnt(report, examples):
        raise ConfigError(
            f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
            f"{number + 1} is {name!r}" + (" with other data" if report.name == name else "")
        )
