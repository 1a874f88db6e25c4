"""Priors, and guide functions, are written for one draw: for several draws they run once for each.

Predictions and fits give every latent leading dims of draws, `(*P, *shape)`, by a plate or by a
handler that supplies values. A function sees one draw, in which it may branch on values and use
plates. The Pyro handlers around it see all draws of a variable as one, with all dims of a draw as
event dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, apply_stack
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Laplace, Normal

from ..base.distributions import base_of
from ..errors import BHPEFTError

_WEIGHTS = ("scale", "mask")  # of its log density


def draw_by_draw(
    sample: Callable[[], dict[str, Tensor]], error: type[BHPEFTError]
) -> dict[str, Tensor]:
    """Run a function that samples once for each draw, and stack what it samples and returns.

    The dims of the draws are those of the first value that has any. What was sampled up to there is
    kept, and the function starts again. Without such dims it is an ordinary run. An `error` says
    that draws do not sample the same variables.

    >>> import pyro
    >>> from bhpeft_pyro.errors import PriorError
    >>> import pyro.distributions as dist
    >>> def prior():
    ...     tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    ...     return {"w": pyro.sample("w", dist.Normal(0.0, tau).expand([3, 8]))}
    >>> with pyro.plate("draws", 7, dim=-2):
    ...     draw_by_draw(prior, PriorError)["w"].shape
    torch.Size([7, 1, 3, 8])
    """
    with _own_plates():
        first = _First()
        try:
            with first:
                return sample()
        except _Several as several:
            lead: torch.Size = several.args[0]
        values, nodes = [], list[dict[str, Any]]()
        supplied: dict[str, Tensor | None] = {**first.values}
        around = [*_PYRO_STACK]
        for number in range(lead.numel()):
            with _Draw(number, lead, supplied, around), poutine.trace() as tracer:
                values.append(sample())
            nodes.append({name: node for name, node in tracer.trace.nodes.items() if _drawn(node)})
        if odd := {name for each in nodes for name in each.keys() ^ nodes[0].keys()}:
            raise error(f"some draws sample {', '.join(map(repr, sorted(odd)))}, others do not")
        for name in nodes[0]:
            if name not in first.values:
                _announce([each[name] for each in nodes], lead)
    return {name: _stacked([each[name] for each in values], lead) for name in values[0]}


def _drawn(node: Any) -> bool:
    return node["type"] == "sample" and not site_is_subsample(node)


def _announce(nodes: Sequence[dict[str, Any]], lead: torch.Size) -> None:
    """Show a variable of all draws to the handlers around."""
    parts = {part: _stacked([node[part] for node in nodes], lead) for part in _WEIGHTS}
    value = _stacked([node["value"] for node in nodes], lead)
    fn = _together([node["fn"] for node in nodes], lead)
    message: Any = {**nodes[0], **parts, "fn": fn, "value": value, "stop": False}
    apply_stack(message)


def _stacked(parts: Sequence[Any], lead: torch.Size) -> Any:
    """Tensors of all draws as one, `(*P, *shape)`; another value that all draws share stays as it
    is."""
    if not isinstance(parts[0], Tensor) and all(part == parts[0] for part in parts):
        return parts[0]
    tensors = [torch.as_tensor(True if part is None else part) for part in parts]
    return torch.stack(tensors).unflatten(0, lead)


def _together(fns: Sequence[Any], lead: torch.Size) -> Any:
    """The distributions of all draws as one of batch shape P. Normals and Laplace distributions
    stay what they are, as their KL is known in closed form, and so do points."""
    bases: list[Any] = [base_of(fn) for fn in fns]
    family = type(bases[0])
    if all(isinstance(base, Delta) for base in bases):
        values = torch.stack([base.v for base in bases]).unflatten(0, lead)
        density = torch.stack([base.log_density.sum() for base in bases]).unflatten(0, lead)
        return Delta(values, log_density=density, event_dim=values.dim() - len(lead))
    if isinstance(bases[0], Normal | Laplace) and all(type(base) is family for base in bases):
        loc, scale = (
            torch.stack([getattr(base, name) for base in bases]).unflatten(0, lead)
            for name in ("loc", "scale")
        )
        whole: Any = family(loc, scale, validate_args=False)
        return whole.to_event(fns[0].event_dim)
    return _Together(fns, lead)


class _Together(TorchDistribution):
    """One distribution for each draw, as one of batch shape P."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, parts: Sequence[Any], lead: torch.Size) -> None:
        self.parts, self.has_rsample = parts, parts[0].has_rsample
        super().__init__(lead, parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.parts[0].support

    def log_prob(self, value: Tensor) -> Tensor:
        draws = value.expand(self.shape()).flatten(0, len(self.batch_shape) - 1)
        densities = [part.log_prob(draw) for part, draw in zip(self.parts, draws, strict=True)]
        return torch.stack(densities).unflatten(0, self.batch_shape)


class _Several(Exception):
    """A value has leading dims, which are the argument."""


class _OneDraw(Messenger):
    """Shows variables of one draw to the handlers around: all their dims are event dims."""

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            message["stop"] = True  # of a plate of the function's own
            return
        if any(isinstance(message[part], Tensor) and message[part].dim() for part in _WEIGHTS):
            raise ValueError(f"{message['name']!r}: expected a scale or mask without dims")
        message["fn"], message["cond_indep_stack"] = message["fn"].to_event(), ()


class _First(_OneDraw):
    """Stops a function at the first value that has leading dims, and keeps those up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self._dims: dict[str, int] = {}

    def _pyro_sample(self, message: Any) -> None:
        super()._pyro_sample(message)
        if not message["stop"]:  # before plates around expand it
            self._dims[message["name"]] = message["fn"].event_dim

    def _pyro_post_sample(self, message: Any) -> None:
        if (dims := self._dims.get(message["name"])) is not None:
            value = self.values[message["name"]] = message["value"]
            if lead := value.shape[: value.dim() - dims]:
                raise _Several(lead)


@dataclass(eq=False)
class _Draw(_OneDraw):
    """Gives a function its values in one draw of those that the handlers around supply, and hides
    the others from them.

    Args:
        number: of the draw.
        lead: P, the dims of the draws.
        supplied: by name the value in all draws, or None if there is none; it is filled in.
        around: the handlers, from the outermost inwards.
    """

    number: int
    lead: torch.Size
    supplied: dict[str, Tensor | None]
    around: Sequence[Messenger]

    def _pyro_sample(self, message: Any) -> None:
        super()._pyro_sample(message)
        if message["stop"]:
            return
        name, shape = message["name"], message["fn"].event_shape
        if name not in self.supplied:
            outer: Any = {**message}
            for handler in reversed(self.around):
                if not outer["stop"]:
                    handler._process_message(outer)
            self.supplied[name] = None if outer["value"] is message["value"] else outer["value"]
        if (value := self.supplied[name]) is not None:
            # Pyro's `Predictive` gives values that have dims of their own no dims of plates.
            if value.numel() != self.lead.numel() * shape.numel():
                value = value.expand(self.lead + shape)
            message["value"] = value.reshape(self.lead.numel(), *shape)[self.number]
        message["stop"] = True


@contextmanager
def _own_plates() -> Iterator[None]:
    """Plates have the dims that they would have if there were none around."""
    outer, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = outer
