"""Early stopping: which state of a fit is kept, and when held-out rows end the fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..base.fit_options import FitOptions
from ..guides import Guide

FEWEST = 50
"""Held-out rows from which they choose the state: fewer would choose by chance. A fit with fewer is
brief instead (`FitOptions.epochs`)."""
_CHECKS = 10  # evaluations of a point estimate whose state held-out rows choose
_PATIENCE = 3  # of these, without a better state, after which it stops


class EarlyStopping:
    """Keeps the best state of a guide by the NLL of held-out rows, and says when to stop.

    Args:
        guide: the guide that is trained.
        options: of the fit; with `patience` evaluations without a better state it stops.
        steps, per_epoch: of the whole fit, and of an epoch.
        selects: whether held-out rows choose the state of a point estimate. If the fit comes to
            its end, the last state is kept unless an earlier one is surely better.
        ratings: whether these are ratings. Otherwise a fit that selects stops after three
            evaluations without a better state: probabilities of later states are too certain,
            while the noise scale of ratings suits the held-out rows at any state.
    """

    def __init__(
        self,
        guide: Guide,
        options: FitOptions,
        steps: int,
        per_epoch: int,
        selects: bool,
        ratings: bool,
    ) -> None:
        self.guide, self.patience = guide, options.patience
        if selects:
            self.patience = steps if ratings else _PATIENCE
        self.steps, self.selects = steps, selects
        self.every = max(1, steps // _CHECKS) if selects else min(per_epoch, steps)
        # The step and state with the lowest held-out NLL so far, and the NLL of each row there.
        self.best: tuple[int, dict[str, Tensor], Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Whether held-out rows are evaluated after this step, counted from 1."""
        return step % self.every == 0 or (self.selects and step == self.steps)

    def ends(self, step: int, rows: Tensor) -> bool:
        """Keep this state if it is the best so far, by the (N,) NLLs of the held-out rows after a
        step; whether the fit ends here."""
        nll = rows.mean().item()
        if not math.isfinite(nll) or not self.patience:
            return False
        if self.best is not None:
            best_step, _, best = self.best
            worse = nll >= best.mean().item()
            if worse and self.selects and step == self.steps:
                # The last state had the smallest steps. That one of ten looks a little better on a
                # hundred rows is mostly chance, so it has to be two standard errors better.
                away = rows - best
                worse = bool(away.mean() > 2 * away.std() / len(away) ** 0.5)
            if worse:
                return step - best_step >= self.patience * self.every
        self.best = step, copied(self.guide.state_dict()), rows
        return False

    def restore(self) -> int | None:
        """Bring the best state back, if one was kept. Its step."""
        if self.best is None:
            return None
        step, state, _ = self.best
        self.guide.load_state_dict(state)
        return step


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the state of a guide, or of weights."""
    return {name: value.detach().clone() for name, value in state.items()}
