"""Whether a stream goes on with the model, the reading and the batches that it began with."""

from __future__ import annotations

import warnings
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from ..base.fit_options import FitOptions
from ..data import Columns
from ..errors import ConfigError, DataError
from ..model.likelihoods import Likelihood
from ..model.model import Model
from ..posterior.posterior import Posterior
from ..posterior.state import describe_likelihood, own_likelihood
from ..posterior.update import has_learnt
from .history import History

# Fields of `Columns`, and the options of `bhpeft stream` for them.
_READING = {
    "text": " (--text-column)",
    "pair": " (--pair-column)",
    "label": " (--label-column)",
    "question": "",
    "choices": "",
    "answer": " (--label-column)",
    "max_length": " (--max-length)",
}


def resumed(history: History, model: Model) -> Posterior | None:
    """The last posterior of a single line of rounds of this model, if there are any."""
    leaves = history.leaves
    if len(leaves) > 1:
        raise ConfigError(
            f"folder: {history.folder} holds {len(leaves)} branches, which end in the rounds "
            f"{', '.join(leaves)}; expected a single line of rounds (`bhpeft history FOLDER --keep "
            "ROUND` keeps the one that ends in ROUND, and moves all others aside)"
        )
    if not leaves:
        return None
    network = model.network
    own = {"prior": model.prior, "likelihood": own_likelihood(model)}
    last = history.load(leaves[0], network.backbone, tokenizer=network.tokenizer, **own)
    there = last.model
    for what, given, found in (
        ("PEFT weights", network.kinds, there.network.kinds),
        ("head", replace(network.head, outputs=2), replace(there.network.head, outputs=2)),
        ("likelihood", _in_words(_standardised(model, there)), _in_words(there.likelihood)),
    ):
        if given != found:
            raise ConfigError(
                f"model: {history.folder} holds rounds of other {what}: {found}, not {given}; "
                "use the same model, or another folder"
            )
    return last


def _in_words(likelihood: Likelihood) -> str:
    plain = describe_likelihood(likelihood)
    return f"{plain.pop('class')}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def _standardised(model: Model, there: Model) -> Likelihood:
    """The model's likelihood in the unit of the first round's ratings, where it leaves it open."""
    given: Any = model.likelihood
    options = vars(given).items() if is_dataclass(given) else ()
    left_open = [name for name, value in options if value is None]
    if not left_open or type(model.likelihood) is not type(there.likelihood):
        return model.likelihood
    known = vars(there.likelihood)
    found: Likelihood = replace(given, **{name: known[name] for name in left_open})
    return found


def read_otherwise(before: Columns, now: Columns) -> tuple[str, str] | None:
    """The first field by which texts or labels are read otherwise than before: both values."""
    for field, option in _READING.items():
        old, new = getattr(before, field), getattr(now, field)
        if old != new:
            return f"{field}={old!r}{option}", f"{new!r}"
    return None


def note_changes(
    last: Posterior, options: FitOptions, keep: float | dict[str, float], folder: str | Path
) -> None:
    """Warn of what may change from one round to the next, but not by mistake."""
    before, now = vars(last.report.options), vars(options)
    changed = [name for name in now if now[name] != before[name] and name != "progress"]
    found = [f"{name}={now[name]} (until now {before[name]})" for name in changed]
    if len(last.lineage) > 1 and keep != last.report.keep:  # the first round forgets nothing
        found.append(f"keep={keep} (until now {last.report.keep})")
    if found:
        warnings.warn(f"{folder}: new rounds are learnt with {', '.join(found)}", stacklevel=3)


def check_same_batch(posterior: Posterior, number: int, name: str, data: object) -> None:
    """Check that a finished round learnt this very batch."""
    report = posterior.lineage[number]
    try:
        same = report.name == name and has_learnt(report, posterior.encode(data))
    except DataError:  # such as labels that it does not know
        same = False
    if not same:
        raise ConfigError(
            f"batches: round {number + 1} in the folder learnt {report.name!r}, and batch "
            f"{number + 1} is {name!r}" + (" with other data" if report.name == name else "")
        )
