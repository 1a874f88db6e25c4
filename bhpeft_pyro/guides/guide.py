"""The contract of this package's guides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..data.batch import Batch
from ..distributions import Covariance
from ..errors import GuideError
from ..model.model import Model
from ..options import FitOptions
from ..priors import PosteriorPrior, Prior
from .optimizers import adam_lr, trained

__all__ = [
    "Guide",
    "components_of",
    "is_linear",
    "is_point",
    "key",
    "optimizers",
    "prior_of",
    "title",
]


def key(site: str) -> str:
    """A site's name as a torch parameter name (which may hold no dots)."""
    return site.replace(".", "/")


class Guide(nn.Module):
    """An approximate posterior over a model's latents.

    Called with a batch (which it may ignore), it samples every latent, as any Pyro guide does. Any
    Pyro guide can be fitted; what a `Guide` adds is that its posterior can become a prior. It is a
    plain torch module with its own parameters: Pyro's global store would mix them up with
    parameters of the same names in another guide.

    A family of your own needs `forward`, `means`, and `distributions` or `as_prior`. The other
    methods have defaults.

    Attributes:
        linear: whether this is a posterior of the network linearised around `means()`. Predictions
            then use its `covariance`.
        point: whether SVI trains a point estimate only; any width is computed afterwards.
        joint: whether it holds correlations between sites from one round to the next.
        own_mode: whether each guide of a mixture starts near a mode of its own, at which its prior
            is centred (`centre`).
        pull: weight of an earlier posterior at the next round's point estimate, by default.
    """

    linear: bool = False
    point: bool = False
    joint: bool = False
    own_mode: bool = False
    pull: float = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; Pyro's `SVI`, which collects parameters by message, sees them."""
        for name, parameter in self.named_parameters():
            _announce(name, parameter)
        return super().__call__(*args, **kwargs)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Sample every latent: site name to a tensor of shape `(*P, *site shape)`."""
        raise NotImplementedError

    def distributions(self) -> dict[str, TorchDistribution]:
        """The posterior as one distribution per site, detached and copied.

        Raises:
            GuideError: the posterior is a point estimate, or joint over several sites.
        """
        raise NotImplementedError

    def as_prior(self) -> Prior:
        """The posterior as a stochastic function of the sites, detached and copied.

        By default one distribution per site; joint guides override this.

        Raises:
            GuideError: the posterior is a point estimate.
        """
        return PosteriorPrior(self.distributions())

    def own_prior(self) -> Prior:
        """A prior of the form that `as_prior` gives after a fit, to check before one."""
        return self.as_prior()

    def means(self) -> dict[str, Tensor]:
        """A central value per site, at which `predict(samples=0)` evaluates the network."""
        raise NotImplementedError

    def move(self, values: Mapping[str, Tensor]) -> None:
        """Set the central values. By default a guide stays where it is.

        Args:
            values: per latent (others stay), of its shape.
        """

    def scales(self) -> dict[str, Tensor]:
        """The sds per site, in unconstrained coordinates, of sites that have one."""
        return {}

    @property
    def covariance(self) -> Covariance | None:
        """The covariance over all weights, in the order of the sites, if the guide has one.

        A `linear` guide with a covariance predicts in closed form.
        """
        return None

    def points(self) -> list[str]:
        """Latents with a point estimate in place of a distribution."""
        return [*self.means()] if self.point else []

    @property
    def components(self) -> Sequence[nn.Module]:
        """The guides of a mixture; this guide alone, unless it is one."""
        return [self]

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        """The optimisers of its parameters, by default Adam.

        Args:
            options: of the fit.
            examples: N.
        """
        return [Adam(trained(self), lr=adam_lr(options))]

    def follow(self, model: Model) -> None:
        """Continue with the same weights under another prior, such as the next round's. For guides
        that keep something of their prior."""

    def centre(self, values: Mapping[str, Tensor]) -> Prior | None:
        """Centre the prior at a start of the guide's own.

        Args:
            values: per site (elsewhere the prior's mean stays), of its shape.

        Returns:
            The new prior, for the model; None from guides without `own_mode`.
        """
        return None

    def hold(self) -> None:
        """Become a point estimate again, before training, if `fit` computes the width."""

    def needs_held_out(self, options: FitOptions) -> bool:
        """Whether held-out rows choose something about it."""
        return self.point and options.temperature is None

    def free_sds(self) -> bool:
        """Whether `fit` may choose where its sds start."""
        return False

    def narrow(self, information: Mapping[str, Tensor]) -> None:
        """Add information to the precisions: sd <- (1 / sd^2 + information)^(-1/2).

        For guides with `free_sds`; by default nothing happens.

        Args:
            information: per site (others stay), of its shape; latents that are not real stay.
        """

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        """The parameters that belong to some of the sites alone."""
        return []

    def scale_slopes(self) -> dict[str, Tensor]:
        """Per site, the mean gradient of the last loss with respect to log sd, if sds are
        trained."""
        return {}

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Append rows to sites along their first dim, independent of all other weights.

        The guide keeps the old model's prior until `follow` gives it the new one's.

        Args:
            rows: per site the means and sds, each `(rows, *shape[1:])` of the site's shape.

        Raises:
            GuideError: this guide cannot grow.
        """
        raise GuideError(
            f"grow: {type(self).__name__} cannot get new rows of {', '.join(rows)}; expected a "
            "'normal' or 'laplace' guide for them"
        )

    def title(self) -> str:
        """A name for reports."""
        return type(self).__name__

    def options(self) -> dict[str, Any]:
        """Constructor arguments that make an equal guide for another model, as plain data."""
        return {}


def _announce(name: str, parameter: nn.Parameter) -> None:
    """Send the message of `pyro.param`, without a copy in the global store."""
    value: Any = parameter.detach()
    value.unconstrained = lambda: parameter
    message: Any = effectful(lambda **_: value, type="param")
    message(name=name)


def components_of(guide: object) -> Sequence[Any]:
    """The guides of a mixture; of any other guide, the guide itself."""
    return guide.components if isinstance(guide, Guide) else [guide]


def optimizers(guide: nn.Module, options: FitOptions, examples: int) -> list[Optimizer]:
    """The optimisers of any guide; Adam if it is not one of this package's."""
    if isinstance(guide, Guide):
        return guide.optimizers(options, examples)
    return [Adam(trained(guide), lr=adam_lr(options))]


def title(guide: object) -> str:
    """A name for reports, of any guide."""
    return guide.title() if isinstance(guide, Guide) else type(guide).__name__


def is_linear(guide: object) -> bool:
    """Whether any guide is a posterior of the network linearised around its means."""
    return isinstance(guide, Guide) and guide.linear


def is_point(guide: object) -> bool:
    """Whether SVI trains a point estimate only, of any guide."""
    return isinstance(guide, Guide) and guide.point


def prior_of(model: Model, guide: nn.Module) -> Prior:
    """A fitted guide as a prior. Sites that the model's prior computes from others still are.

    Raises:
        GuideError: the guide is a point estimate, or not one of this package's.
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
