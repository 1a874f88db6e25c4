"""A posterior's predictions compared with those of reference draws, for example of NUTS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.checks import SEED, Number, check
from ..errors import ConfigError
from ..model.cached_batches import CachedBatches
from ..model.model import Model
from ..posterior.posterior import Posterior
from ..prediction.draws import Draws, draw_parts
from ..prediction.passes import passes

_LEAST = 1e-9  # the sd of a prediction that no draw changes


@dataclass(frozen=True, eq=False)
class Comparison:
    """A posterior's predictions of N examples (probabilities of classes or labels, means of
    ratings) compared with those of reference draws.

    Attributes:
        errors: (M,) differences of the means, in the reference's sds; M is N times the number of
            classes, without what no reference draw changes.
        ratios: (M,) sds, as multiples of the reference's.
        noise: the sd that `errors` would have from the finite numbers of draws alone.

    >>> print(Comparison(torch.tensor([0.1, -0.3]), torch.tensor([0.5, 0.5]), 0.05))
    means off by 0.22 reference sds (rms, 0.30 at most; noise 0.05); sds 0.50 of the reference's \
(0.50 to 0.50)
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

    def __str__(self) -> str:
        if not len(self.errors):
            return "no prediction changes from one reference draw to another"
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

    The posterior predicts as `Posterior.predict` does, so a Laplace approximation uses the
    linearised network. The reference draws use the network itself: what is lost by linearising
    counts as an error.

    Args:
        posterior: the posterior.
        draws: for each site of the model `(R, *site shape)`, as `MCMC.get_samples()` gives them,
            from the posterior given the data that the guide was fitted to.
        data: texts, labelled or not.
        samples: draws of the guide.
        seed: the same seed gives the same draws.

    Raises:
        ConfigError: fewer than two draws, or draws that do not fit the model's sites.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(()), "normal", tiny_examples(), max_steps=20, progress=False)
    >>> compared = against(fitted, fitted.sample(1000, seed=1), ["w5 w20", "w6 w21"])
    >>> compared.error < 0.2, 0.9 < compared.ratio < 1.1
    (True, True)
    """
    samples, seed = Number(least=2, whole=True)("samples", samples), SEED("seed", seed)
    check(draws, Mapping, "draws", "a tensor of draws for each site")
    model = posterior.model
    reference = _checked(model, draws)
    feed = CachedBatches(model, posterior.encode(data, labelled=False))
    ours = predictions(model, draw_parts(model, posterior.guide, samples, seed), feed)
    theirs = predictions(model, [Draws(reference)], feed)
    sd = theirs.std(0)
    changing = sd > _LEAST  # probabilities of missing choices are always 0
    sd = sd[changing]
    ratios = ours.std(0)[changing] / sd
    return Comparison(
        errors=(ours.mean(0) - theirs.mean(0))[changing] / sd,
        ratios=ratios,
        noise=(ratios.square().mean().item() / len(ours) + 1 / len(theirs)) ** 0.5,
    )


def predictions(model: Model, draws: Iterable[Draws], feed: CachedBatches) -> Tensor:
    """(S, N, K) float64: probabilities of classes or labels under each draw, or with K = 1 means of
    ratings."""
    kind = model.likelihood.kind
    classes = kind in ("class", "choice")
    parts = passes(
        model, draws, feed, lambda predicted, _: (predicted.probs if classes else predicted.mean,)
    )
    values = torch.cat([part.double() for (part,) in parts])
    return values.unsqueeze(-1) if kind == "rating" else values


def _checked(model: Model, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(R, 1, *shape) for each site."""
    device = model.network.device
    found = {name: torch.as_tensor(value).detach().to(device) for name, value in draws.items()}
    for site in model.sites:
        value = found.get(site.name)
        if value is None or value.dim() < 1 or tuple(value.shape[1:]) != site.shape:
            got = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ConfigError(f"draws: site {site.name!r} has {got}, expected (R, *{site.shape})")
    counts = sorted({len(found[site.name]) for site in model.sites})
    if len(counts) != 1 or counts[0] < 2:
        raise ConfigError(f"draws: expected equally many for every site, 2 or more, got {counts}")
    return {site.name: found[site.name].unsqueeze(1) for site in model.sites}
