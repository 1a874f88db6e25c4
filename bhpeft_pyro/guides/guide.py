"""The contract of this package's own guides."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import _PYRO_STACK, effectful
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from ..priors import PosteriorPrior, Prior

__all__ = ["Guide", "blocks_of", "is_linear", "is_point", "key", "prior_of"]


def key(site: str) -> str:
    """A site's name as a torch parameter name (which may hold no dots)."""
    return site.replace(".", "/")


def _tell(name: str, parameter: nn.Parameter) -> None:
    """What `pyro.param` says of a parameter, without a copy in the global store."""
    parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    tell: Any = effectful(lambda **_: parameter, type="param")
    tell(name=name)


class Guide(nn.Module):
    """An approximate posterior over a model's latents.

    Called with a batch (which it may ignore) it samples every latent, as any Pyro guide does. A
    guide of your own may be any Pyro guide; what it adds by being a `Guide` is that its
    posterior can become a prior. Being a plain torch module, it keeps its parameters to itself:
    Pyro's global store would mix them up with those of the same names in another guide.

    Attributes:
        linear: whether it is a posterior of the network linearised around its means, and so it
            predicts.
        point: whether SVI trains a point only: any width it has is measured afterwards.
    """

    linear: bool = False
    point: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As every module's; Pyro's `SVI`, which asks for parameters by message, sees them."""
        if any(getattr(handler, "param_only", False) for handler in _PYRO_STACK):
            for name, parameter in self.named_parameters():
                _tell(name, parameter)
        return super().__call__(*args, **kwargs)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Sample every latent: site name to a tensor of shape `(*P, *site shape)`."""
        raise NotImplementedError

    def distributions(self) -> dict[str, TorchDistribution]:
        """The posterior as one distribution per site, detached and copied.

        Raises:
            GuideError: the posterior is degenerate (a point).
        """
        raise NotImplementedError

    def as_prior(self) -> Prior:
        """The posterior as a stochastic function of the sites, detached and copied.

        One distribution per site, unless a guide knows better: a joint one overrides this.

        Raises:
            GuideError: the posterior is degenerate (a point).
        """
        return PosteriorPrior(self.distributions())

    def follow(self, model: Model) -> None:
        """Go on as a guide of the same weights under another prior: the next round's, or one whose
        scales have been set since. For guides that keep something of their prior."""

    def means(self) -> dict[str, Tensor]:
        """A central value per site: where `predict(samples=0)` looks."""
        raise NotImplementedError

    def move(self, values: Mapping[str, Tensor]) -> None:
        """Start elsewhere: at other central values than `means` gives now.

        For guides that `fit` may start from other places; others stay.

        Args:
            values: per latent (others stay), of its shape.
        """

    def scales(self) -> dict[str, Tensor]:
        """The sds per site, in unconstrained coordinates, of those that have one."""
        return {}

    def narrow(self, information: Mapping[str, Tensor]) -> None:
        """Add information to the precisions: sd <- (1 / sd^2 + information)^(-1/2).

        For guides whose sds `fit` may start where it likes; others leave it be.

        Args:
            information: per site (others stay), of its shape; latents that are not real stay.
        """

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add rows to sites, last along their first dim and independent of all that is there.

        What the guide has of the prior is that of the old model until it has to `follow` the new.

        Args:
            rows: per site the means and sds, each `(rows, *shape[1:])` of the site's shape.

        Raises:
            GuideError: it cannot.
        """
        raise GuideError(
            f"grow: {type(self).__name__} takes no new rows of {', '.join(rows)}; expected a "
            "'normal', 'laplace', 'lowrank' or 'full' guide of them"
        )

    def blocks(self) -> list[Guide]:
        """The independent guides that it is made of: itself, unless it is made of others."""
        return [self]

    def options(self) -> dict[str, Any]:
        """What makes the like of it for another model, by its constructor: plain data."""
        return {}

    def natural_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(loc, log scale) pairs for `NaturalGradient`; none unless a guide has them."""
        return []


def blocks_of(guide: object) -> list[object]:
    """The independent guides that any guide is made of."""
    return [*guide.blocks()] if isinstance(guide, Guide) else [guide]


def is_linear(guide: object) -> bool:
    """Whether any guide is a posterior of the network linearised around its means."""
    return isinstance(guide, Guide) and guide.linear


def is_point(guide: object) -> bool:
    """Whether SVI trains nothing but a point of any guide."""
    blocks = blocks_of(guide)
    return all(isinstance(block, Guide) and block.point for block in blocks)


def prior_of(model: Model, guide: nn.Module) -> Prior:
    """A fitted guide as a prior; sites that its model's prior makes out of others go on so.

    Raises:
        GuideError: the guide is a point, or not one of this package's.
    """
    if not isinstance(guide, Guide):
        name = type(guide).__name__
        raise GuideError(
            f"{name} does not say how its posterior becomes a prior; "
            + (
                f"fit the one that bh.autoguide({name}, model) makes"
                if isinstance(guide, AutoGuide)
                else "derive your guide from bhpeft_pyro.guides.Guide and give it distributions()"
            )
        )
    prior = guide.as_prior()
    if isinstance(prior, PosteriorPrior) and not prior.covers(model.sites):
        made_by = model.prior
        if isinstance(made_by, PosteriorPrior) and made_by.structure is not None:
            made_by = made_by.structure
        return PosteriorPrior(prior.distributions, made_by)
    return prior
