"""Early stopping: which state of a fit is kept, and when held-out rows end the fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..guides import Guide


class EarlyStopping:
    """Keeps the best state of a guide by the NLL of held-out rows, and says when to stop.

    Args:
        guide: the guide that is trained.
        every: steps from one evaluation to the next.
        patience: evaluations without a better state, after which the fit stops; None keeps no
            state and never stops.
        last: the last step, if it is evaluated and its state is kept unless an earlier one is
            surely better.
    """

    def __init__(
        self, guide: Guide, every: int, patience: int | None, last: int | None = None
    ) -> None:
        self.guide, self.every, self.patience, self.last = guide, every, patience, last
        # The step and state with the lowest held-out NLL so far, and the NLL of each row there.
        self.best: tuple[int, dict[str, Tensor], Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Whether held-out rows are evaluated after this step, counted from 1."""
        return step % self.every == 0 or step == self.last

    def ends(self, step: int, rows: Tensor) -> bool:
        """Keep this state if it is the best so far, by the (N,) NLLs of the held-out rows after a
        step; whether the fit ends here."""
        nll = rows.mean().item()
        if not math.isfinite(nll) or not self.patience:
            return False
        if self.best is not None:
            best_step, _, best = self.best
            worse = nll >= best.mean().item()
            if worse and step == self.last:
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
