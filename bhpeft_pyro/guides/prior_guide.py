"""A model's prior as a guide, to draw from and to predict with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from ..priors import checked
from ..priors.any_prior import check_no_evidence
from .guide import Guide


def prior_like(model: Model, guide: Guide) -> Guide:
    """The prior that a guide was fitted under, to predict with as the guide does.

    Under a `linear` guide the network is linearised around the guide's means.
    """
    return PriorGuide(guide.under_prior(model), guide.means() if guide.linear else None)


class PriorGuide(Guide):
    """A model's prior in the form of a guide, to draw from and to predict with.

    Args:
        model: the model.
        around: weights at which the network is linearised for predictions; by default it is not.

    Raises:
        PriorError: the prior has observations or factors, which its draws would leave out.
    """

    def __init__(self, model: Model, around: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        check_no_evidence(model.prior, model.sites, "draws of the prior")
        self._model = (model,)  # a tuple keeps it out of the submodules
        self._around, self.linear = around, around is not None

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        (model,) = self._model
        return checked(model.prior, model.sites)

    def means(self) -> dict[str, Tensor]:
        if self._around is None:
            raise GuideError("a prior has no central values; expected samples=1 or more")
        return dict(self._around)
