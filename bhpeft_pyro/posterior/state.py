"""A fitted posterior as plain data: what is stored, and what `Posterior` gives methods to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from ..data import Columns, Examples
from ..inference.report import FitReport
from ..model.model import Model
from ..priors import Prior


@dataclass(frozen=True, eq=False)
class Coreset:
    """Examples kept for later rounds, and the posterior of all other examples.

    Attributes:
        examples: learnt last; any later round may learn them again, starting from `guide`.
        guide: the posterior of everything except these examples.
        report: of the fit that learnt them.
    """

    examples: Examples
    guide: nn.Module
    report: FitReport


@dataclass(eq=False, repr=False)
class PosteriorState:
    """The attributes of a `Posterior`, where they are described."""

    model: Model
    guide: nn.Module
    lineage: tuple[FitReport, ...]
    columns: Columns = Columns()
    first_prior: Prior | None = None
    coreset: Coreset | None = None

    @property
    def components(self) -> tuple[PosteriorState, ...]:
        """The independent fits of a mixture; otherwise the posterior itself."""
        return (self,)

    def replace(self, **changes: Any) -> Self:
        """The same posterior with some attributes changed."""
        new = copy.copy(self)
        vars(new).update(changes)
        return new
