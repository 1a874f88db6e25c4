"""How a fit treats a guide: what `fit`, `update` and `widen` ask of it besides its training.

Most guides are trained, under the model's prior, and that is all: this is the default `Strategy`.
A Laplace approximation is trained under a prior of its own, and its covariance is computed after
the training (`guides/laplace/laplace_strategy.py`). A guide of a user's own needs no strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..base.fit_options import FitOptions
from ..data import Examples
from ..model.model import Model
from ..priors import Prior

if TYPE_CHECKING:
    from .guide import Guide
    from .laplace.choice_of_tau import Width


class Earlier(NamedTuple):
    """What earlier rounds have learnt.

    Attributes:
        rows: how many rows, as far as they are kept.
        separation: the AUROC with which the round's texts can be told from theirs, from 0.5 to 1;
            None if it is not known.
        output_scale: of the round, if no held-out rows choose it.
        learnt: (C,) bool, which classes they have learnt; None if it is all.
        texts: of their rows, some that were kept; None if none were.
    """

    rows: float
    separation: float | None = None
    output_scale: float = 1.0
    learnt: Tensor | None = None
    texts: Examples | None = None

    def share(self, size: int) -> float:
        """Of the rows of all rounds, those of a round of so many rows."""
        return size / (size + self.rows)

    def step(self, size: int) -> float:
        """The share of its step that a round of so many rows keeps: half of it, more with more
        rows than before, and all of it if its texts are of the kind of the earlier ones."""
        unlike = 1.0 if self.separation is None else 2 * self.separation - 1
        return size / (size + unlike * min(self.rows, size))


class Strategy:
    """How a fit treats a guide; `Guide.strategy` returns it.

    Args:
        guide: the guide.

    Attributes:
        centres_prior: whether each component of a mixture starts near a mode of its own, with its
            prior centred there.
        training_share: the share of a fit's time that training takes; the rest computes a width.
    """

    centres_prior: bool = False
    training_share: float = 1.0

    def __init__(self, guide: Guide) -> None:
        self.guide = guide

    # Before a round

    def needs_held_out(self, options: FitOptions) -> bool:
        """Whether `fit` should hold out rows to choose something about the guide."""
        return self.guide.point and options.temperature is None

    @property
    def default_temperature(self) -> float:
        """At which a point estimate is trained in a later round, if none is given."""
        return 1.0

    def drop_covariance(self) -> None:
        """Become a point estimate again before training, if the width is computed after it."""

    def centre_prior(self, values: Mapping[str, Tensor]) -> Prior | None:
        """Centre the prior at initial values of some sites, if the guide `centres_prior`, and
        return it for the model; None if it is unchanged."""
        return None

    def reset_prior(self, model: Model) -> None:
        """Continue with the same weights under the model's prior, which no earlier posterior has
        become."""
        self.guide.set_prior(model)

    def set_first_prior_sds(self, sds: Mapping[str, Tensor], last: Guide) -> None:
        """Note the sds of the first round's prior, by site, for a guide that is made in a later
        round; `last` is the guide of the round before."""

    # The fit

    def objective(
        self, model: Model, temperature: float, later: bool
    ) -> tuple[Model, float, float]:
        """What training at a temperature minimises.

        Args:
            model: under the prior of the round.
            temperature: of the fit.
            later: whether that prior is an earlier posterior.

        Returns:
            The model with the prior that acts in training, the weight of the KL to that prior, and
            the least value of this KL if it is known or else 0; reported KLs are counted from it.
        """
        return model, temperature, 0.0

    def average(self, share: float) -> None:
        """Move a point estimate that a later round has trained back towards that of the last round,
        if the prior is one: it keeps this share of its step."""

    def compute_width(
        self,
        model: Model,
        examples: Examples,
        held_out: Examples | None,
        options: FitOptions,
        earlier: Earlier | None = None,
        last_noise: Tensor | None = None,
    ) -> tuple[Model, Width | None]:
        """Compute what is not trained, once the guide is trained on the examples.

        Args:
            model: with the prior that the guide was fitted under.
            examples: the training data.
            held_out: labelled examples by which the width is chosen.
            options: of the fit.
            earlier: what earlier rounds have learnt; None in the first round.
            last_noise: the logarithm of their noise scale of ratings, (), if the guide has pooled
                it with the errors of this round, of which the width explains a part.

        Returns:
            The model with the prior of the width, and the width; None if all of it is trained.
        """
        return model, None

    # After a round

    def first_prior(self, before: Prior | None) -> Prior | None:
        """The first round's prior after a fit, which may have set its scales, from that before."""
        return before

    def fitted_prior(self) -> Prior:
        """A prior of the form that `as_prior` will have, available before a fit too. If the guide
        `centres_prior`, the prior that it is fitted under."""
        return self.guide.as_prior()

    def prior_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The means and sds that `as_prior` passes on to the next round."""
        return self.guide.means(), self.guide.scales()

    def target(self, model: Model, temperature: float, later: bool) -> tuple[Model, Guide, float]:
        """The posterior that the guide approximates after a fit; arguments are as in `objective`.

        Returns:
            The model, the guide as a guide of that model, and the temperature.
        """
        return model, self.guide, temperature

    def for_predictions(self, model: Model) -> Model:
        """The model under its prior as that would predict in place of this posterior."""
        return model
