"""Priors, and guide functions, are written for one draw, and run here for all draws at once.

Predictions and fits give every latent leading dims of draws, `(*P, *shape)`. `torch.vmap` hides
them from the prior, which so sees one draw; the Pyro handlers around it (plates, replay, trace) see
all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.runtime import apply_stack
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from ..base.distributions import Covariance, base_of
from ..errors import PriorError
from ..peft.sites import Site

if TYPE_CHECKING:
    from .prior import Prior

_BESIDES = ("value", "scale", "mask")  # parts of a message that may be tensors, as an observation


def for_all_draws(prior: Prior, sites: Sequence[Site]) -> Mapping[str, Tensor]:
    """Call a prior such that every value has the leading dims of draws.

    The dims are those of the first value that has any, whether a plate gives them or a handler that
    supplies values. What the prior sampled up to there is kept, and the prior starts again. A prior
    with the attribute `vectorised` handles the dims itself.

    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.model.head import Head
    >>> def prior(sites):
    ...     tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    ...     return {s.name: pyro.sample(s.name, dist.Normal(0.0, tau).expand(s.shape).to_event())
    ...             for s in sites}
    >>> with pyro.plate("draws", 7, dim=-2):
    ...     for_all_draws(prior, Head(3).sites(8))["head.weight"].shape
    torch.Size([7, 1, 3, 8])
    """
    if getattr(prior, "vectorised", False):
        return prior(sites)
    return run_for_all_draws(partial(prior, sites), "prior")


def run_for_all_draws(
    sample: Callable[[], Mapping[str, Tensor]], what: str
) -> Mapping[str, Tensor]:
    """The same for a function without arguments that samples; `what` it is, for messages."""
    first = _First()
    try:
        with first:
            return sample()
    except _LeadingDims as error:
        lead: torch.Size = error.args[0]
    valid = is_validation_enabled()

    def one(number: Tensor) -> Mapping[str, Tensor]:
        # Validation would branch on values, which vmap hides.
        with _Rest(number, lead, first.sampled, valid, what), pyro.validation_enabled(False):
            return sample()

    values = torch.vmap(one, randomness="different")(torch.arange(lead.numel()))
    return {name: value.unflatten(0, lead) for name, value in values.items()}


class _LeadingDims(Exception):
    """A value has leading dims, which are the argument."""


class _First(Messenger):
    """Stops a prior at the first value that has leading dims, and keeps the values up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.sampled: dict[str, Tensor] = {}
        self._shape = torch.Size()

    def _pyro_sample(self, message: Any) -> None:
        if not site_is_subsample(message):
            self._shape = message["fn"].shape()

    def _pyro_post_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            return
        value = self.sampled[message["name"]] = message["value"]
        if dims := value.shape[: value.dim() - len(self._shape)]:
            raise _LeadingDims(dims)


@dataclass(eq=False)
class _Rest(Messenger):
    """Shows one draw of each value to the prior inside, and all draws to the handlers around it.

    `number` is that of the draw, under vmap; `lead` is P, the dims of the draws; `sampled` has the
    values so far; `valid` says whether distributions validate their arguments; `what` samples.
    """

    number: Tensor
    lead: torch.Size
    sampled: Mapping[str, Tensor]
    valid: bool
    what: str

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            return
        if plates := ", ".join(repr(frame.name) for frame in message["cond_indep_stack"]):
            raise PriorError(
                f"{self.what}: the site {message['name']!r} is in the plate {plates}, whose dim "
                "would collide with those of the draws. Expected no plates; declare dims as events "
                "with .to_event()"
            )
        tensors: list[Tensor] = []

        def seen(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        with_tensors([message[part] for part in ("fn", *_BESIDES)], seen)
        value = _Outside.apply(partial(self._sample, message), self.number, *tensors)
        message.update(value=value, done=True, stop=True)

    def _sample(self, message: Any, tensors: Sequence[Tensor], varies: Sequence[bool]) -> Tensor:
        """All draws of a value, `(draws, *shape)`, by the handlers around, from the message of one.

        `tensors` are those of its distribution and of `_BESIDES`, in every draw; those that
        `varies` says differ between draws are `(draws, *shape)`.
        """
        outer: Any = {**message}
        fn, shape = message["fn"], message["fn"].shape()
        if (value := self.sampled.get(message["name"])) is None:
            for part in reversed(_BESIDES):
                if isinstance(message[part], Tensor):
                    *tensors, own = tensors
                    *varies, apart = varies
                    outer[part] = own.unflatten(0, self.lead) if apart else own
            if any(varies):
                outer["fn"] = self._together(fn, tensors, varies)
            with _only_around(self), pyro.validation_enabled(self.valid):
                apply_stack(outer)
            value = outer["value"]
        # Pyro's `Predictive` gives values that have dims of their own no dims of plates.
        draws = self.lead.numel()
        if value.numel() != draws * shape.numel():
            value = value.expand(self.lead + shape)
        return value.reshape(draws, *shape)

    def _together(self, fn: Any, tensors: Sequence[Tensor], varies: Sequence[bool]) -> Any:
        """The distributions of all draws as one, of batch shape `(*P, *batch)`."""
        every = [
            tensor if apart else tensor.expand(self.lead.numel(), *tensor.shape)
            for tensor, apart in zip(tensors, varies, strict=True)
        ]
        base: Any = base_of(fn)
        if isinstance(base, Delta):
            point, density = (tensor.unflatten(0, self.lead) for tensor in every)
            at = Delta(point, density, event_dim=base.event_dim)
            return at.to_event(fn.event_dim - base.event_dim)
        if isinstance(base, (Normal, Laplace)) and every[0].shape[1:] == base.batch_shape:
            loc, scale = (tensor.unflatten(0, self.lead) for tensor in every)
            whole: Any = type(base)(loc, scale, validate_args=self.valid)
            return whole.to_event(fn.event_dim)
        parts = []
        for draw in zip(*every, strict=True):
            tensors_of_draw = iter(draw)
            parts.append(with_tensors(fn, lambda _, rest=tensors_of_draw: next(rest)))  # type: ignore[misc]
        return _Draws(parts, self.lead)


class _Draws(TorchDistribution):
    """One distribution for each draw, as one of batch shape `(*P, *batch)`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, parts: Sequence[Any], lead: torch.Size) -> None:
        first = parts[0]
        self.parts, self.lead, self.has_rsample = parts, lead, first.has_rsample
        super().__init__(lead + first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.parts[0].support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        draws = torch.stack([part(sample_shape) for part in self.parts], len(sample_shape))
        return draws.unflatten(len(sample_shape), self.lead)

    def log_prob(self, value: Tensor) -> Tensor:
        draws = value.expand(self.shape()).flatten(0, len(self.lead) - 1)
        densities = [part.log_prob(draw) for part, draw in zip(self.parts, draws, strict=True)]
        return torch.stack(densities).unflatten(0, self.lead)


class _Outside(torch.autograd.Function):
    """Calls a function of tensors of all draws where vmap knows those of one draw."""

    @staticmethod
    def forward(call: Any, number: Tensor, *tensors: Tensor) -> Any:
        raise NotImplementedError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError("only under vmap")

    @staticmethod
    def vmap(info: Any, dims: Any, call: Any, number: Tensor, *tensors: Tensor) -> Any:
        _, _, *tensor_dims = dims
        whole = [
            tensor if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, tensor_dims, strict=True)
        ]
        return call(whole, [dim is not None for dim in tensor_dims]), 0


@contextmanager
def _only_around(messenger: Messenger) -> Iterator[None]:
    """Pyro's handlers without this one and those inside it."""
    inside = False

    def inner(other: Messenger) -> bool:  # asked from the outermost handler inwards
        nonlocal inside
        inside = inside or other is messenger
        return inside

    with block_messengers(inner):
        yield


def with_tensors(
    part: Any, change: Callable[[Tensor], Tensor], made: dict[int, Any] | None = None
) -> Any:
    """A distribution, a part of one, or several of them, with other tensors."""
    made = {} if made is None else made  # a transform and its inverse hold each other
    if id(part) in made:
        return made[id(part)]
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, list):
        return [with_tensors(each, change, made) for each in part]
    if isinstance(part, dict):
        return {key: with_tensors(value, change, made) for key, value in part.items()}
    if isinstance(part, (Distribution, Transform, Constraint, Covariance)):
        twin = made[id(part)] = copy.copy(part)
        vars(twin).update(with_tensors(vars(part), change, made))
        return twin
    return part
