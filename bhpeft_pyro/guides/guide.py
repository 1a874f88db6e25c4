"""The contract of this package's guides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
from pyro.distributions import TorchDistribution
from pyro.poutine.runtime import effectful
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer

from ..base.distributions import Covariance, with_tensors
from ..base.fit_options import FitOptions
from ..base.isolation import own_parameters
from ..data import Examples
from ..data.batch import Batch
from ..errors import ConfigError, GuideError
from ..model.model import Model
from ..priors import PosteriorPrior, Prior
from ..priors.any_prior import with_structure
from .earlier import Earlier

if TYPE_CHECKING:
    from .laplace.choice_of_tau import Width

NOISE_STEPS = 10.0
"""Step size of the noise scale of a point estimate, as a multiple of that of other weights."""
_POINT_LR, _DRAWN_LR = 2e-3, 1e-2  # of weights themselves, and of a distribution of weights


class Guide(nn.Module):
    """An approximate posterior over a model's latents, which can become the next round's prior.

    `fit` accepts any Pyro guide. A `Guide` can also be updated in rounds. To write a family of your
    own, define:

    * `forward`, which samples every latent as any Pyro guide does;
    * `means`, the central values;
    * `distributions` (one per site), or `as_prior` if sites are correlated.

    Everything else has a default; docs/own-guide.md has an example. A guide holds its parameters as
    a plain torch module does, or as a `PyroModule`. They never enter Pyro's global store, where
    they would mix with parameters of the same names in another guide.

    Attributes:
        point: SVI trains a point estimate; a width, if any, is computed afterwards.
        linear: this is a posterior of the network linearised around `means()`, and predictions use
            `covariance`.
        joint: it keeps correlations between sites from one round to the next.
        centres_prior: each component of a mixture starts near a mode of its own, with its prior
            centred there.
        draws_kept: how many draws it consists of; None for a distribution.
    """

    point: bool = False
    linear: bool = False
    joint: bool = False
    centres_prior: bool = False
    draws_kept: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, and announce its parameters to Pyro's `SVI`, which collects them.

        Raises:
            GuideError: it has a `pyro.param` statement, whose parameter would be lost.
        """
        for name, parameter in self.named_parameters():
            _announce(name, parameter)
        with own_parameters():
            values = super().__call__(*args, **kwargs)
            own = {id(parameter) for parameter in self.parameters()}
            stored = pyro.get_param_store().named_parameters()
            if lost := [name for name, value in stored if id(value) not in own]:
                raise GuideError(
                    f"guide: {self.title()} declares {', '.join(map(repr, lost))} by pyro.param; "
                    "expected parameters of its own (nn.Parameter, PyroParam), or a function that "
                    "calls it"
                )
        return values

    # What a family must define

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Sample every latent: from names to tensors of shape `(*P, *site shape)`.

        Args:
            batch: the data, which most guides ignore; None in predictions.
        """
        raise NotImplementedError

    def means(self) -> dict[str, Tensor]:
        """A central value of each latent, at which `predict(samples=0)` evaluates the network."""
        raise self._undefined("means")

    def distributions(self) -> dict[str, TorchDistribution]:
        """The posterior of each latent.

        Raises:
            GuideError: the posterior is a point estimate, or sites are correlated.
        """
        raise self._undefined("distributions")

    def _undefined(self, method: str) -> GuideError:
        return GuideError(
            f"guide: {type(self).__name__} does not define {method}(), which this needs "
            "(docs/own-guide.md)"
        )

    def as_prior(self) -> Prior:
        """The posterior as a prior, detached and copied; by default made of `distributions()`.

        Raises:
            GuideError: the posterior is a point estimate.
        """
        latents = self.distributions().items()
        copied = {name: with_tensors(q, lambda x: x.detach().clone()) for name, q in latents}
        return PosteriorPrior(copied)

    # What it says of itself

    def options(self) -> dict[str, Any]:
        """The constructor's arguments besides the model, as plain data; a saved guide needs
        them."""
        return {}

    def check_trained(self) -> None:
        """Called after the first backward pass, to refuse parameters that do not train."""

    def title(self) -> str:
        """A name for reports."""
        return type(self).__name__

    def scales(self) -> dict[str, Tensor]:
        """The sds of latents that have one, in unconstrained coordinates."""
        return {}

    def statistics(self, samples: int, seed: int) -> dict[str, Tensor]:
        """By name, what a sampler said of the draws that `prediction.draw` takes for a seed."""
        return {}

    def points(self) -> list[str]:
        """The latents with a point estimate in place of a distribution."""
        return [*self.means()] if self.point else []

    @property
    def covariance(self) -> Covariance | None:
        """The covariance of all weights, in the order of `means()`. A `linear` guide that has one
        predicts in closed form."""
        return None

    @property
    def source(self) -> Any:
        """The class or function that this guide is made of; a saved guide has its name."""
        return type(self)

    # What moves it

    def move(self, values: Mapping[str, Tensor]) -> None:
        """Set the central values of some latents, by name. By default nothing happens."""

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        """The optimisers of its parameters for a fit to so many examples; by default Adam."""
        return [Adam(trained(self), lr=adam_lr(options, self.point))]

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        """The parameters that belong to these sites only; a fit can hold them fixed for a while."""
        return []

    def informed(self) -> bool:
        """Whether its prior is the first one and, apart from it, information of earlier data."""
        return False

    def free_sds(self) -> bool:
        """Whether `fit` may choose the initial sds (by `narrow`)."""
        return False

    def narrow(self, information: Mapping[str, Tensor]) -> None:
        """Add information, by site, to precisions: sd <- (1 / sd^2 + information)^(-1/2). Latents
        that are not real-valued are unchanged."""

    # How a fit treats it: by default it is trained under the model's prior, and that is all

    def drop_covariance(self) -> None:
        """Become a point estimate again before training, if the width is computed after it."""

    def centre_prior(self, values: Mapping[str, Tensor]) -> Prior | None:
        """Centre the prior at initial values of some sites, if the guide `centres_prior`, and
        return it for the model; None if it is unchanged."""
        return None

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

    def first_prior(self, before: Prior | None) -> Prior | None:
        """The first round's prior after a fit, which may have set its scales, from that before."""
        return before

    def target(self, model: Model, temperature: float, later: bool) -> tuple[Model, Guide, float]:
        """The posterior that the guide approximates after a fit; arguments are as in `objective`.

        Returns:
            The model, the guide as a guide of that model, and the temperature.
        """
        return model, self, temperature

    def under_prior(self, model: Model) -> Model:
        """The model under the prior that would predict in place of this posterior."""
        return model

    # From round to round

    def set_prior(self, model: Model) -> None:
        """Continue with the same weights under the model's prior, such as the next round's."""

    def spread_out(self, samples: int, generator: Generator) -> dict[str, Tensor]:
        """Values of auxiliary sites, (samples,) each, for draws that represent the posterior better
        than independent ones."""
        return {}

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Append rows to sites along their first dimension, independent of all other weights: by
        site their means and sds, `(rows, *site shape[1:])` each.

        The guide keeps the old model's prior until `set_prior`.

        Raises:
            GuideError: this family cannot grow.
        """
        raise GuideError(
            f"grow: {type(self).__name__} cannot get new rows of {', '.join(rows)}; expected a "
            "'normal' or 'laplace' guide for them"
        )


def guides_of(guide: Guide | Sequence[Guide]) -> Sequence[Guide]:
    """The guides of all components."""
    return [guide] if isinstance(guide, Guide) else guide


def key(site: str) -> str:
    """A site's name as the name of a torch parameter, which cannot contain dots; another one for
    each site."""
    return site.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def _announce(name: str, parameter: nn.Parameter) -> None:
    """Send the message of `pyro.param`, without a copy in the global store."""
    value: Any = parameter.detach()
    value.unconstrained = lambda: parameter
    message: Any = effectful(lambda **_: value, type="param")
    message(name=name)


def trained(guide: nn.Module) -> list[nn.Parameter]:
    """The parameters to be fitted, of which there must be some (GuideError)."""
    parameters = [p for p in guide.parameters() if p.requires_grad]
    if not parameters:
        raise GuideError("the guide has no parameters to fit")
    return parameters


def check_no_others(value: Tensor, guide: nn.Module) -> None:
    """Refuse trainable tensors behind a value that are no parameters of the guide: they would stay
    as they are, in silence.

    Raises:
        GuideError: there are some.
    """
    own, seen = {id(parameter) for parameter in guide.parameters()}, set[Any]()
    stored = {id(tensor) for tensor in pyro.get_param_store().get_state()["params"].values()}
    others, nodes = dict[int, Tensor](), [value.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Any = getattr(node, "variable", None)
        # Other leaves, such as the embeddings' outputs, may require gradients too.
        if (isinstance(leaf, nn.Parameter) or id(leaf) in stored) and id(leaf) not in own:
            others[id(leaf)] = leaf
        nodes += [before for before, _ in node.next_functions]
    if others:
        shapes = ", ".join(str(tuple(other.shape)) for other in others.values())
        raise GuideError(
            f"guide, likelihood: trainable tensors of the shapes {shapes} are no parameters of the "
            "guide, so they would not be trained. If a guide function calls a module, pass the "
            "module itself; weights of a likelihood are its `sites` (docs/own-model.md)"
        )


def adam_lr(options: FitOptions, point: bool = True) -> float:
    """The learning rate of Adam, for point estimates or for other guides."""
    default = _POINT_LR if point else _DRAWN_LR
    return default if options.lr is None else options.lr


def check_not_linear(guide: Guide, argument: str) -> None:
    """Refuse an argument that would run the network itself under draws of a linearised one."""
    if guide.linear:
        raise ConfigError(
            f"{argument}: this posterior is of the network linearised around its central values, "
            "and at a draw the network itself predicts something else; expected those values"
        )


def prior_of(model: Model, guide: Guide) -> Prior:
    """A fitted guide as a prior. Sites that the model's prior computes from others still are."""
    return with_structure(guide.as_prior(), model.prior, model.sites)
