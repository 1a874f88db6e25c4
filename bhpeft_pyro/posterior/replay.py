"""Replay: examples that every round learns again (variational continual learning; Nguyen et al.
2018).

In each round:

1. The pool is the new data and the last round's coreset.
2. A new coreset is chosen from the pool: a random sample of the examples of all rounds since replay
   began.
3. The guide learns the rest of the pool.
4. A copy of it also learns the new coreset, and that copy predicts.
5. The next round starts from the guide of step 3, with the new coreset in its pool.

So every example counts exactly once in the posterior that predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data import Examples
from ..errors import ConfigError
from ..guides import Guide
from ..training.report import FitReport


@dataclass(frozen=True, eq=False)
class Coreset:
    """Examples kept for later rounds, and the posterior of all other examples.

    Attributes:
        examples: learnt last; any later round may learn them again, starting from `guide`.
        guide: the posterior of everything except these examples.
        report: of the fit that learnt them.
    """

    examples: Examples
    guide: Guide
    report: FitReport


def set_aside(
    pool: Examples, size: int, seed: int, old: int = 0, seen: int = 0
) -> tuple[Examples, Examples]:
    """The coreset and the rest of a pool: a sample of all rows since replay began, if the last
    coreset was one (reservoir sampling).

    Args:
        pool: the new data, then the last coreset.
        size: of the coreset.
        seed: of the sample.
        old: the size of the last coreset.
        seen: the number of examples that it is a sample of.

    Raises:
        ConfigError: nothing is left to learn.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> kept, rest = set_aside(tiny_examples(12), size=3, seed=0)
    >>> len(kept), len(rest)
    (3, 9)
    """
    if size >= len(pool):
        raise ConfigError(f"replay={size} must be below the number of examples, {len(pool)}")
    generator = torch.Generator().manual_seed(seed)
    new = len(pool) - old
    sample = torch.randperm(seen + new, generator=generator)[:size]
    again = min(int((sample < seen).sum()), old)
    last = new + torch.randperm(old, generator=generator)
    fresh = torch.randperm(new, generator=generator)
    order = torch.cat([last[:again], fresh, last[again:]])
    kept, rest = order[:size], order[size:]
    return pool.subset(kept.sort().values), pool.subset(rest.sort().values)


def seen_by(lineage: Sequence[FitReport]) -> int:
    """The number of examples that the last coreset is a sample of: those of the rounds since replay
    began."""
    count = 0
    for report in reversed(lineage):
        count += report.examples
        if report.data_with_replay in ("", report.data):  # there was no earlier coreset
            break
    return count
