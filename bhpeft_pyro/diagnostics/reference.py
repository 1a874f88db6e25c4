"""A posterior's predictions against those of reference draws, of NUTS say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ConfigError
from ..inference.passes import Block, Feed, drawn
from .ratios import run

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = ["Comparison", "against"]

_LEAST = 1e-9  # the sd of a prediction that no draw changes


@dataclass(frozen=True, eq=False)
class Comparison:
    """Predictions of N examples (class probabilities, means of ratings): a posterior's and a
    reference's.

    Attributes:
        errors: (M,) differences of the means, in the reference's sds; M is N times the number of
            classes, less what no reference draw changes.
        ratios: (M,) sds, as multiples of the reference's.
        noise: what `errors` would be by the finite numbers of draws alone, as a sd.

    >>> import torch
    >>> comparison = Comparison(torch.tensor([0.1, -0.3]), torch.tensor([0.5, 0.5]), 0.05)
    >>> print(comparison)
    means off by 0.22 reference sds (rms, 0.30 at most; noise 0.05); sds 0.50 of the reference's \
(0.50 to 0.50)
    >>> comparison.near(means=0.5, sds=1.25), comparison.near(means=0.5, sds=2.5)
    (False, True)
    """

    errors: Tensor
    ratios: Tensor
    noise: float

    @property
    def error(self) -> float:
        """Root mean square of `errors`."""
        return self.errors.square().mean().sqrt().item()

    @property
    def ratio(self) -> float:
        """Geometric mean of `ratios`, below 1 for a posterior that is too sure."""
        return self.ratios.log().mean().exp().item()

    def near(self, means: float = 0.3, sds: float = 1.25) -> bool:
        """Whether `error` is at most `means` and `ratio` within a factor of `sds` of 1."""
        if not means > 0 or not sds > 1:
            raise ConfigError(f"means={means} must be above 0 and sds={sds} above 1")
        return self.error <= means and 1 / sds <= self.ratio <= sds

    def __str__(self) -> str:
        return (
            f"means off by {self.error:.2f} reference sds (rms, {self.errors.abs().max():.2f} at "
            f"most; noise {self.noise:.2f}); sds {self.ratio:.2f} of the reference's "
            f"({self.ratios.min():.2f} to {self.ratios.max():.2f})"
        )


def against(
    posterior: Posterior,
    draws: Mapping[str, Tensor],
    data: object,
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare what a posterior and reference draws predict for texts.

    Each predicts as it does by itself: a linear guide with the linearised network, as
    `Posterior.predict`, and the reference draws with the model's own, so that what is lost by
    linearising counts too.

    Args:
        posterior: the posterior.
        draws: for each site of the model `(R, *site shape)`, as `MCMC.get_samples()` gives them,
            of the posterior given the data that the guide was fitted to.
        data: texts, labelled or not.
        samples: draws of the guide.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: fewer than two draws, or draws that are not those of the model's sites.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(()), "normal", tiny_examples(), max_steps=20, progress=False)
    >>> against(fitted, fitted.sample(1000, seed=1), ["w5 w20", "w6 w21"]).near()
    True
    """
    if samples < 2:
        raise ConfigError(f"samples={samples} must be at least 2")
    model = posterior.model
    reference = _reference(posterior, draws)
    examples = posterior.encode(data, labelled=False)
    feed = Feed(model, examples)
    ours = run(model, drawn(model, posterior.guide, samples, seed), feed).predictions
    theirs = run(model, [Block(reference)], feed).predictions
    changing = theirs.std(0) > _LEAST  # probabilities of choices that don't exist are always 0
    sd = theirs.std(0)[changing]
    return Comparison(
        errors=(ours.mean(0) - theirs.mean(0))[changing] / sd,
        ratios=ours.std(0)[changing] / sd,
        noise=(1 / samples + 1 / theirs.shape[0]) ** 0.5,
    )


def _reference(posterior: Posterior, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(R, 1, *shape), checked."""
    found, counts = {}, set()
    for site in posterior.model.sites:
        value = draws.get(site.name)
        if value is None or value.dim() < 1 or tuple(value.shape[1:]) != site.shape:
            got = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ConfigError(f"draws: site {site.name!r} has {got}, expected (R, *{site.shape})")
        counts.add(len(value))
        found[site.name] = value.detach().unsqueeze(1)
    if len(counts) != 1 or min(counts) < 2:
        raise ConfigError(
            f"draws: expected equally many for every site, two or more, got {sorted(counts)}"
        )
    return found
