"""Doubts about labels, said before anything is learnt from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, norm
from torch import Tensor

from ..base.checks import few, warn
from ..errors import BHPEFTWarning
from .table import is_number

if TYPE_CHECKING:
    from .examples import Examples

_FEW = 10  # labels: of fewer, any class may have but one
_SHOWN = 3  # doubts of a kind, and classes whose meanings changed
_SURE = math.log(0.001)  # of a p-value
_SEPARATORS = ";|,"


class LabelWarning(BHPEFTWarning):
    """Labels may not mean what they should: a class is there once, is called nearly like another or
    looks like several, or the labels of a round contradict the posterior, or all of them are new.

    An error instead: `warnings.simplefilter("error", bh.data.LabelWarning)`.
    """


def tally(examples: Examples) -> str:
    """How many examples each class has; of ratings where they lie.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> tally(tiny_examples(5))
    '0 3, 1 2'
    """
    labels = examples.labels
    if labels is None or examples.kind == "choice":
        return ""
    if examples.kind == "rating":
        numbers = labels.double()
        sd = numbers.std(correction=0)
        ends = f"{numbers.min():g} to {numbers.max():g}"
        return f"ratings from {ends}, mean {numbers.mean():.3g}, sd {sd:.3g}"
    if examples.kind == "labels":
        counts = labels.sum(0).long()
    else:
        counts = labels.bincount(minlength=examples.num_labels or 0)
    names = examples.label_names or [str(k) for k in range(len(counts))]
    parts = [f"{name} {count}" for name, count in zip(names, counts.tolist(), strict=True)]
    return few(parts)


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case or in spaces around them alone."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(name.strip().casefold(), name), name) for name in names]
    return [(one, other) for one, other in pairs if one != other]


def called(name: str, others: Iterable[str]) -> str:
    """A name as a message shows it, with the other one that is written most like it, if any is."""
    plain = {other.strip().casefold(): other for other in others}
    near = get_close_matches(name.strip().casefold(), plain, n=1, cutoff=0.8)
    return f"{name!r} (may mean {plain[near[0]]!r})" if near else repr(name)


def warn_of_classes(column: str, labels: Sequence[str], old: Sequence[str] = ()) -> None:
    """Warn of classes that may be mistakes, by the labels of all rows. `old` are those of earlier
    rounds; `grow` itself says which new ones look like them."""
    counts = Counter(labels)
    names = [*old, *sorted(counts.keys() - {*old})]
    new = names[len(old) :]
    parted = _parted(names)
    joined = [
        f"{name!r} may be several labels (a list of them is JSON, {json.dumps(parted[name])})"
        for name in new
        if name in parted
    ]
    pairs = look_alikes(new)
    alike = [f"{one!r} and {other!r} are two classes" for one, other in pairs]
    other = {*parted, *chain.from_iterable(pairs)}
    single = [name for name in new if counts[name] == 1 and name not in other]
    often = [name for name in names if name not in single]
    alone = [f"{called(name, often)} is there once" for name in single]
    kinds = [joined, alike, alone if len(labels) >= _FEW else []]
    if any(kinds):
        if all(map(is_number, names)) and any("." in name for name in names):
            kinds = [["these are real numbers: --task ratings"]]  # and no names that are misspelt
        listed = (few(some, _SHOWN, "; ", "; and {} more of this kind") for some in kinds if some)
        warn(LabelWarning(f"column {column!r}: {'; '.join(listed)}"))


def _parted(names: Sequence[str]) -> dict[str, list[str]]:
    """The names that are several with separators between them: of "a;b" one part is a class, or
    part of another name."""
    parted: dict[str, list[str]] = {}
    for mark in _SEPARATORS:
        parts_of = {name: [part.strip() for part in name.split(mark)] for name in names}
        uses = Counter(chain.from_iterable({*parts} for parts in parts_of.values()))
        for name, parts in parts_of.items():
            if len(parts) > 1 and any(part and uses[part] > 1 for part in parts):
                parted[name] = parts
    return parted


def swapped(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> str | None:
    """Say what the classes would have to mean for the labels (n,) not to contradict what was
    predicted (n,); None if they do not.

    The exchange of meanings that explains most is compared with what it would explain if forecasts
    and labels had nothing to do with each other, so that rare classes and a forecast of one class
    alone are no contradiction. The p-value counts all exchanges of so many classes.
    """
    there, flat = torch.cat([labels, predicted]).unique(return_inverse=True)
    size, count = len(there), len(labels)
    cells = flat[:count] * size + flat[count:]
    table = cells.bincount(minlength=size**2).double().reshape(size, size)
    above = table - table.sum(1).outer(table.sum(0)) / max(count, 1)  # what chance gives
    stay = torch.arange(size)
    # As they are, if nothing explains more.
    prefer = above + 1e-6 * torch.eye(size)
    meaning = torch.from_numpy(linear_sum_assignment(prefer, maximize=True)[1])
    moved = stay[meaning != stay]
    gained, lost = table[moved, meaning[moved]].sum(), table[moved, moved].sum()
    if gained <= lost or above[moved, moved].sum() >= 0:
        return None
    share = (gained - above[moved, meaning[moved]].sum()) / count
    exchanges = math.lgamma(size + 1) - math.lgamma(size - len(moved) + 1) - 1
    if binom.logsf(gained - 1, count, share) + max(exchanges, 0) > _SURE:
        return None
    right = table.trace() / count
    explained = right + (gained - lost) / count
    return (
        f"predicts {right:.0%} of {count} as they are labelled, and {explained:.0%} if "
        f"{_exchange([names[k] for k in there.tolist()], meaning.tolist())}"
    )


def _exchange(names: Sequence[str], meaning: Sequence[int]) -> str:
    moved = [k for k, other in enumerate(meaning) if other != k]
    pairs = [k for k in moved if meaning[meaning[k]] == k and k < meaning[k]]
    rest = [k for k in moved if meaning[meaning[k]] != k]
    said = [f"{names[k]!r} and {names[meaning[k]]!r} were swapped" for k in pairs]
    said += [f"{names[k]!r} meant {names[meaning[k]]!r}" for k in rest]
    return few(said, _SHOWN, more=" and {} more so")


def turned(predicted: Tensor, ratings: Tensor) -> str | None:
    """How ratings (n,) contradict what was predicted (n,): they fall where it rises."""
    count = len(ratings)
    r = float(torch.corrcoef(torch.stack([predicted, ratings]).double())[0, 1]) if count > 1 else 0
    if not norm.logsf(-r * math.sqrt(count - 1)) < _SURE:
        return None
    return f"is correlated with {count} ratings by {r:.2f}: the scale may be turned round"
