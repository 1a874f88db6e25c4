"""Replay: examples that every round learns again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import COUNT, check_fields
from ..data import Examples
from ..errors import ConfigError
from ..guides import Guide
from ..inference.report import FitReport


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


@dataclass(frozen=True)
class Replay:
    """A coreset: examples that each round learns last, and passes on to the next round to be learnt
    again (variational continual learning; Nguyen et al. 2018).

    In each round:

    1. The pool is the new data and the last round's coreset.
    2. A new coreset of `size` examples is chosen from the pool: a random sample of all rounds'
       examples (reservoir sampling).
    3. The guide learns the rest of the pool.
    4. A copy of it also learns the new coreset, and that copy predicts.
    5. The next round starts from the guide of step 3, with the new coreset in its pool.

    So every example counts exactly once in the posterior that predicts.

    Args:
        size: the number of examples.

    Raises:
        ConfigError: `size` is below 1.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> kept, rest = Replay(size=3).split(tiny_examples(12), seed=0)
    >>> len(kept), len(rest)
    (3, 9)
    """

    size: int

    def __post_init__(self) -> None:
        check_fields(self, {"size": COUNT}, "Replay")

    def split(
        self, pool: Examples, seed: int, old: int = 0, seen: int = 0
    ) -> tuple[Examples, Examples]:
        """The coreset and the rest of a pool: a sample of all rows so far, if the last coreset was
        one (reservoir sampling).

        Args:
            pool: the new data, then the last coreset.
            seed: of the sample.
            old: the size of the last coreset.
            seen: the number of examples of all earlier rounds, if there was a coreset.

        Raises:
            ConfigError: nothing is left to learn.
        """
        if self.size >= len(pool):
            raise ConfigError(
                f"Replay: size={self.size} must be below the number of examples, {len(pool)}"
            )
        generator = torch.Generator().manual_seed(seed)
        new = len(pool) - old
        sample = torch.randperm(seen + new, generator=generator)[: self.size]
        again = min(int((sample < seen).sum()), old)
        last = new + torch.randperm(old, generator=generator)
        fresh = torch.randperm(new, generator=generator)
        order = torch.cat([last[:again], fresh, last[again:]])
        kept, rest = order[: self.size], order[self.size :]
        return pool.subset(kept.sort().values), pool.subset(rest.sort().values)
