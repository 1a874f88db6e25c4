"""Replay without counting anything twice: a coreset, learnt last of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..data import Examples
from ..errors import ConfigError
from ..peft.kinds import check_count
from ..plain import make_plain
from ..posterior import Posterior

__all__ = ["Replay"]

By = Literal["random", "uncertain"]


@dataclass(frozen=True)
class Replay:
    """A coreset of at most `size` examples (Nguyen et al. 2018, variational continual learning).

    Round t has new data D and last round's coreset C. A new coreset C' is chosen out of both. The
    posterior of all else learns what is left of them, (D and C) without C'; a copy of it then
    learns C', and that copy is what predicts. So every example of every round is in the
    copy's evidence exactly once, and the next round starts without C', which it may learn or keep
    again.

    Args:
        size: examples kept.
        by: "random", equally likely for all; or "uncertain", those of which the last posterior
            knows least (epistemic uncertainty; in the first round, random).

    Raises:
        ConfigError: a size below 1, another `by`.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> kept, rest = Replay(size=3).split(tiny_examples(12), seed=0)
    >>> len(kept), len(rest)
    (3, 9)
    """

    size: int
    by: By = "random"

    def __post_init__(self) -> None:
        make_plain(self)
        check_count("Replay", "size", self.size)
        if self.by not in get_args(By):
            raise ConfigError(f"Replay: by={self.by!r} is not one of 'random', 'uncertain'")

    def split(
        self, pool: Examples, seed: int, posterior: Posterior | None = None
    ) -> tuple[Examples, Examples]:
        """The coreset, and the rest of the pool.

        Args:
            pool: new data and the last coreset.
            seed: of the choice.
            posterior: the last one.

        Raises:
            ConfigError: nothing would be left to learn.
        """
        if self.size >= len(pool):
            raise ConfigError(
                f"Replay: size={self.size} leaves nothing of {len(pool)} examples to learn; "
                "keep fewer"
            )
        if self.by == "uncertain" and posterior is not None:
            order = posterior.predict(pool, seed=seed).epistemic.argsort(descending=True)
        else:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        kept, rest = order[: self.size], order[self.size :]
        return pool.subset(kept.sort().values), pool.subset(rest.sort().values)
