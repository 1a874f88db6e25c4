"""A hand-written guide function with `pyro.param` statements, as a module.

A model's prior in the form of a guide, to draw from and to predict with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from .guide import Guide, key
from .laplace import LaplaceGuide
from .mixture import MixtureGuide

__all__ = [
    "FunctionGuide",
    "prior_guide",
    "prior_like",
]


class FunctionGuide(nn.Module):
    """Holds the parameters that a guide function declares, out of Pyro's global store.

    `fit` wraps plain functions in it, so that they train with torch optimisers, are
    copied with their posterior, and never share a parameter with another model's guide.

    Args:
        function: `guide(batch)`, sampling every latent; it is called once, with None, and has to
            declare all of its parameters then: predictions call it so too.

    Raises:
        GuideError: a sample statement with batch dims: all dims of a weight are event dims; or,
            later, a parameter that is declared for data alone, or that no loss depends on.

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
        with pyro.get_param_store().scope() as state, poutine.block(), poutine.trace() as tracer:
            function(None)
        for name, node in prune_subsample_sites(tracer.trace).iter_stochastic_nodes():
            fn: Any = node["fn"]
            if shape := tuple(fn.batch_shape):
                raise GuideError(
                    f"guide: the site {name!r} has batch shape {shape}, expected (): declare its "
                    "dims as events with .to_event()"
                )
        self._constraints = state["constraints"]
        self._names = list(state["params"])
        # Copies: the store holds the very tensor that a function starts a parameter from.
        self.parameters_ = nn.ParameterDict(
            {
                key(name): nn.Parameter(value.detach().clone())
                for name, value in state["params"].items()
            }
        )

    def check_trained(self) -> None:
        """Whether every parameter had a part in a loss that has gone backwards.

        Raises:
            GuideError: one had none.
        """
        left = [name for name in self._names if self.parameters_[key(name)].grad is None]
        if left:
            raise GuideError(
                f"guide: {', '.join(map(repr, left))} had no part in the loss, and would stay at "
                "the start; a function that runs a module is not known to train its parameters: "
                "pass the module itself"
            )

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor] | None:
        """Call the function, its parameters being this module's."""
        params = {name: self.parameters_[key(name)] for name in self._names}
        store = pyro.get_param_store()
        with store.scope({"params": params, "constraints": self._constraints}) as state:
            result: dict[str, Tensor] | None = self.function(batch)
        if late := [name for name in state["params"] if name not in params]:
            raise GuideError(
                f"guide: it declares {', '.join(map(repr, late))} only when it is given data; "
                "expected all parameters when it is called with None, as predictions call it"
            )
        return result


class _LinearPrior(Guide):
    """Predicts with the network linearised around given weights."""

    linear = True

    def __init__(self, draw: Callable[..., Any], around: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self._draw, self._around = draw, around

    def forward(self, batch: object = None) -> dict[str, Tensor]:
        return dict(self._draw(batch))

    def means(self) -> dict[str, Tensor]:
        return self._around()


def prior_guide(
    model: Model, around: Callable[[], dict[str, Tensor]] | None = None
) -> Callable[..., Any]:
    """A model's prior in the form of a guide.

    Args:
        model: the model.
        around: gives the weights around which its network is linearised; by default it is not.
    """

    def draw(batch: object = None) -> Mapping[str, Tensor]:
        return model.prior(model.sites)

    return draw if around is None else _LinearPrior(draw, around)


def prior_like(model: Model, guide: object) -> Callable[..., Any]:
    """The prior of the model that a guide is a posterior of.

    That is of the linearised network where the guide's is, around the guide's own means; of a
    mixture as many draws for each component.
    """
    if isinstance(guide, MixtureGuide) and guide.linear:
        components: list[Any] = [prior_like(model, each) for each in guide.components]
        return MixtureGuide(components)
    if isinstance(guide, LaplaceGuide):
        model = Model(model.network, guide.own_prior(), model.likelihood)
    return prior_guide(model, guide.means if isinstance(guide, Guide) and guide.linear else None)
