"""Modules, functions with `pyro.param` statements, and priors as guides of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..base.checks import shown
from ..base.distributions import Covariance
from ..base.threads import alone, sampling
from ..data.batch import Batch
from ..errors import ConfigError, GuideError
from ..model.model import Model
from ..priors import JointPrior, Prior, checked
from .blocks import MixtureGuide
from .guide import Guide, key


class ForeignGuide(Guide):
    """A guide that knows its draws and their density alone. It can be fitted and predicts, but is
    no prior of a next round."""

    instead = "derive your guide from bhpeft_pyro.guides.Guide and give it distributions()"

    def means(self) -> dict[str, Tensor]:
        raise GuideError(
            f"samples=0 needs the guide's central values, which {self.title()} does not have; "
            "expected samples=1 or more"
        )

    def as_prior(self) -> Prior:
        raise GuideError(
            f"{self.title()} does not say how its posterior becomes a prior; {self.instead}, or "
            "give update(..., prior=...) the next prior"
        )


class ModuleGuide(ForeignGuide):
    """Any module that is a Pyro guide; `fit` wraps it in this.

    Args:
        module: the guide, which is fitted in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        if isinstance(module, AutoGuide):
            self.instead = f"fit the one that bh.autoguide({self.title()}, model) makes"

    def forward(self, batch: Batch | None = None) -> Any:
        return self.module(batch)

    def title(self) -> str:
        return type(self.module).__name__

    def means(self) -> dict[str, Tensor]:
        if not isinstance(self.module, AutoGuide):
            return super().means()
        with alone():
            return dict(self.module.median(None))


class FunctionGuide(ForeignGuide):
    """A guide function as a module that holds the parameters of its `pyro.param` statements.

    `fit` wraps functions in it. The parameters train with torch optimisers, are copied with their
    posterior, and stay out of Pyro's global store, where another guide could share them.

    Args:
        function: `guide(batch)`, which samples every latent. It is called once with None, as
            predictions call it too, and must declare all parameters then.

    Raises:
        GuideError: it cannot be called with None, or a sample statement has batch dims (all dims of
            a weight are event dims). Later: a parameter is only declared if there are data, or no
            loss depends on it.

    >>> import pyro.distributions as dist
    >>> import torch
    >>> def guide(batch):
    ...     pyro.sample("head.bias", dist.Delta(pyro.param("b", torch.zeros(2)), event_dim=1))
    >>> [name for name, _ in FunctionGuide(guide).named_parameters()]
    ['parameters_.b']
    """

    def __init__(self, function: Callable[[Batch | None], Any]) -> None:
        super().__init__()
        self.function = function
        with (
            sampling(),
            pyro.get_param_store().scope() as state,
            poutine.block(),
            poutine.trace() as tracer,
        ):
            try:
                function(None)
            except (AttributeError, TypeError) as error:
                raise GuideError(f"guide: calling {shown(function)} with None: {error}") from error
        for name, node in prune_subsample_sites(tracer.trace).iter_stochastic_nodes():
            fn: Any = node["fn"]
            if shape := tuple(fn.batch_shape):
                raise GuideError(
                    f"guide: the site {name!r} has batch shape {shape}, expected (): declare its "
                    "dims as events with .to_event()"
                )
        self._constraints = state["constraints"]
        self._names = list(state["params"])
        # Copies, because the store holds the function's own initial tensors.
        self.parameters_ = nn.ParameterDict(
            {
                key(name): nn.Parameter(value.detach().clone())
                for name, value in state["params"].items()
            }
        )

    def load_store(self) -> None:
        """Take the parameters that Pyro's SVI has trained, from the global store.

        Raises:
            GuideError: one of them is not there.
        """
        trained = pyro.get_param_store().get_state()["params"]
        if missing := [name for name in self._names if name not in trained]:
            raise GuideError(
                f"guide: Pyro's store has no {', '.join(map(repr, missing))}; expected a guide "
                "that SVI has trained"
            )
        for name in self._names:
            self.parameters_[key(name)].data.copy_(trained[name])

    def check_trained(self) -> None:
        """Check, after a backward pass, that the loss depends on every parameter.

        Raises:
            GuideError: it does not.
        """
        unused = [name for name in self._names if self.parameters_[key(name)].grad is None]
        if unused:
            raise GuideError(
                f"guide: the loss does not depend on {', '.join(map(repr, unused))}, which would "
                "not be trained; if the function calls a module, pass the module itself"
            )

    def forward(self, batch: Batch | None = None) -> Any:
        """Call the function with this module's parameters."""
        params = {name: self.parameters_[key(name)] for name in self._names}
        store = pyro.get_param_store()
        with store.scope({"params": params, "constraints": self._constraints}) as state:
            result = self.function(batch)
        if late := [name for name in state["params"] if name not in params]:
            raise GuideError(
                f"guide: the function declares {', '.join(map(repr, late))} only if it gets data; "
                "expected all parameters when it is called with None, as predictions call it"
            )
        return result


def as_guide(guide: object) -> Guide:
    """Any guide as one of this package.

    Raises:
        ConfigError: it is neither a module nor a function.
    """
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, nn.Module):
        return ModuleGuide(guide)
    if callable(guide):
        return FunctionGuide(guide)
    raise ConfigError(f"guide: expected a guide's name, a module or a function, got {shown(guide)}")


def prior_like(model: Model, guide: Guide) -> Guide:
    """The prior that a guide was fitted under, to predict with as the guide does.

    Under a `linear` guide the network is linearised around the guide's means. Under a mixture this
    is a mixture too, of the priors of its components.
    """
    if isinstance(guide, MixtureGuide):
        priors = getattr(model.prior, "parts", [model.prior] * len(guide.components))
        pairs = zip(priors, guide.components, strict=True)
        return MixtureGuide([prior_like(model.with_prior(prior), each) for prior, each in pairs])
    strategy = guide.strategy
    if strategy.centres_prior:
        model, _ = strategy.for_predictions(model.with_prior(strategy.fitted_prior()))
    return PriorGuide(model, guide.means() if guide.linear else None)


class PriorGuide(Guide):
    """A model's prior in the form of a guide, to draw from and to predict with.

    Args:
        model: the model.
        around: weights at which the network is linearised for predictions; by default it is not.
    """

    def __init__(self, model: Model, around: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._model = (model,)  # a tuple keeps it out of the submodules
        self._around, self.linear = around, around is not None

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        (model,) = self._model
        return checked(model.prior, model.sites)

    @property
    def covariance(self) -> Covariance | None:
        prior = self._model[0].prior
        if self._around is None or not isinstance(prior, JointPrior):
            return None
        # The closed form of predictions is that of a mean where the network is linearised.
        around = torch.cat([self._around[name].flatten() for name in prior.shapes])
        return prior.normal.covariance if torch.equal(around, prior.normal.loc) else None

    def means(self) -> dict[str, Tensor]:
        if self._around is None:
            raise GuideError("a prior has no central values; expected samples=1 or more")
        return dict(self._around)
