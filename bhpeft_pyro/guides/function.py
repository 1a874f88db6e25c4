"""Guide functions with `pyro.param` statements as modules, and priors in the form of guides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..checks import shown
from ..data.batch import Batch
from ..distributions import Covariance
from ..errors import GuideError
from ..model.model import Model
from ..priors import JointPrior, checked
from ..threads import sampling
from .blocks import MixtureGuide
from .guide import Guide, key


class FunctionGuide(nn.Module):
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
            except TypeError as error:
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

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor] | None:
        """Call the function with this module's parameters."""
        params = {name: self.parameters_[key(name)] for name in self._names}
        store = pyro.get_param_store()
        with store.scope({"params": params, "constraints": self._constraints}) as state:
            result: dict[str, Tensor] | None = self.function(batch)
        if late := [name for name in state["params"] if name not in params]:
            raise GuideError(
                f"guide: the function declares {', '.join(map(repr, late))} only if it gets data; "
                "expected all parameters when it is called with None, as predictions call it"
            )
        return result


def prior_guide(model: Model, around: Mapping[str, Tensor] | None = None) -> Guide:
    """A model's prior in the form of a guide, to draw from and to predict with.

    Args:
        model: the model.
        around: weights at which the network is linearised for predictions; by default it is not.
    """
    return _PriorGuide(model, around)


def prior_like(model: Model, guide: object) -> Guide:
    """The prior that a guide was fitted under, to predict with as the guide does.

    Under a `linear` guide the network is linearised around the guide's means. Under a mixture this
    is a mixture too, of the priors of its components.
    """
    if isinstance(guide, MixtureGuide):
        priors = getattr(model.prior, "parts", [model.prior] * len(guide.components))
        pairs = zip(priors, guide.components, strict=True)
        return MixtureGuide([prior_like(model.with_prior(prior), each) for prior, each in pairs])
    if not isinstance(guide, Guide):
        return prior_guide(model)
    if guide.own_mode:
        model, _ = guide.for_predictions(model.with_prior(guide.own_prior()))
    return prior_guide(model, guide.means() if guide.linear else None)


class _PriorGuide(Guide):
    def __init__(self, model: Model, around: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self._model = (model,)  # a tuple keeps it out of the submodules
        self._around, self.linear = around, around is not None

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        (model,) = self._model
        return checked(model.prior, model.sites)

    @property
    def covariance(self) -> Covariance | None:
        prior = self._model[0].prior
        return prior.normal.covariance if self.linear and isinstance(prior, JointPrior) else None

    def means(self) -> dict[str, Tensor]:
        if self._around is None:
            raise GuideError("a prior has no central values; expected samples=1 or more")
        return dict(self._around)
