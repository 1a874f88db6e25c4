"""The network linearised in its weights: what the generalised Gauss-Newton posterior is of.

Around weights `at`, f(w) becomes f(at) + J(at) (w - at). A Normal over very many weights moves a
transformer's outputs by more than its first order, along directions about which data say nothing;
under the linearised network it does not (Khan et al. 2019; Immer, Korzepa and Bauer 2021).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .batch import Batch
from .errors import ConfigError, GuideError
from .model import Model

__all__ = ["MAX_BYTES", "LinearModel", "linear_predictives"]

MAX_BYTES = 2**29
"""Draws are predicted with together, a pass of the network for all, up to so many bytes of them."""


class LinearModel(Model):
    """A model whose network is linearised around weights that may move.

    Any Pyro inference runs on it that takes first derivatives. An evaluation with its gradient
    costs about twice what the network's own do, and hardly more memory.

    Args:
        model: the model.
        around: gives the weights to linearise around, a tensor of its shape for each site but
            those that the prior holds constant; no gradient flows through them.

    Raises:
        ConfigError: second derivatives are asked for.
        GuideError: a layer of the backbone has no forward derivative.

    >>> from bhpeft_pyro.testing import tiny_batch, tiny_model
    >>> model = tiny_model()
    >>> zeros = {site.name: torch.zeros(site.shape) for site in model.sites}
    >>> linear = LinearModel(model, lambda: zeros)
    >>> batch = tiny_batch(4)
    >>> bool((linear.outputs(zeros, batch) == model.outputs(zeros, batch)).all())
    True
    """

    def __init__(self, model: Model, around: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__(model.network, model.prior, model.likelihood)
        self.around = around
        _load_decompositions()

    def outputs(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if batch.features is not None:  # a head is linear as it is
            return super().outputs(weights, batch)
        around = self.around()
        points: dict[str, Tensor] = {}
        away: dict[str, Tensor] = {}
        for site in self.network.sites:
            weight = weights[site.name]
            at = around.get(site.name, weight).detach()
            away[site.name] = weight.detach() - at
            # The value is `at` and the derivative by the weight 1: so J(at) is the gradient's.
            points[site.name] = at + (weight - weight.detach())
        change = self._change(points, away, batch)  # first, while there is no graph in memory
        return _Moved.apply(super().outputs(points, batch), change)

    @torch.no_grad()
    def _change(
        self, points: Mapping[str, Tensor], away: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """J(at) (w - at), the derivative along the way."""
        # Of torch's attention kernels only the plain one has forward derivatives.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _FrozenLayers():
            pairs = {
                name: forward_ad.make_dual(point.detach(), away[name])
                for name, point in points.items()
            }
            try:
                value, change = forward_ad.unpack_dual(super().outputs(pairs, batch))
            except NotImplementedError as error:  # of quantised layers, say
                raise GuideError(
                    "a linearised network needs forward derivatives, which a layer of the backbone "
                    f"has not ({str(error).splitlines()[0]}); expected a guide that does without: "
                    "'lowrank' or 'normal'"
                ) from error
        return torch.zeros_like(value) if change is None else change


# Layers by the function that they call: which of its arguments is the input, and what the output
# moves by when that does.
_LAYERS: dict[Any, tuple[int, Callable[..., Tensor]]] = {
    functional.linear: (0, lambda change, weight, bias=None: functional.linear(change, weight)),
    torch.addmm: (1, lambda bias, change, weight: change @ weight),  # GPT-2's
}


@cache
def _load_decompositions() -> None:
    """What torch loads at the first forward derivative, and with it a warning of its own doings."""
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")
        import_module("torch._decomp.decompositions_for_jvp")


class _FrozenLayers(TorchFunctionMode):
    """Forward derivatives through layers whose weights do not move.

    torch's own multiply by the weights' derivatives as well, which are zeros: three products of
    matrices where two do, and in these a transformer spends its time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LAYERS and not kwargs:
            place, linear = _LAYERS[func]
            before, x, after = args[:place], args[place], args[place + 1 :]
            value, change = forward_ad.unpack_dual(x)
            if change is not None and not any(map(_moves, (*before, *after))):
                moved = linear(*before, change, *after)
                return forward_ad.make_dual(func(*before, value, *after), moved)
        return func(*args, **(kwargs or {}))


def _moves(argument: Tensor | None) -> bool:
    return argument is not None and forward_ad.unpack_dual(argument).tangent is not None


class _Moved(torch.autograd.Function):
    """value + change, with the gradient of the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Tensor) -> Tensor:
        return value + change

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            # They would be the network's own, and the linearised one has none.
            raise ConfigError(
                "create_graph=True asks for second derivatives, which LinearModel does not give; "
                "expected False"
            )
        return gradient, None


def linear_predictives(
    model: Model, at: Mapping[str, Tensor], blocks: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[int, Callable[[Batch], TorchDistribution]]]:
    """The labels' distribution in the linearised network, under up to `MAX_BYTES` of draws at once.

    A batch costs one pass forwards and one backwards for each output, however many draws are
    together: each example is run under weights of its own, and its gradient multiplies all of them.

    Args:
        at: a tensor of its shape for each site of the network.
        blocks: some draws at a time, for each site of the model a tensor `(s, 1, *shape)`.

    Yields:
        A number S of draws, and from a batch of B examples to a distribution of batch shape (S, B).
        Use it before the next is asked for: then its draws are gone.
    """
    own = [site.name for site in model.likelihood.sites]
    away: list[Tensor] = []
    given: list[dict[str, Tensor]] = []
    count = 0
    for block in blocks:
        ways = [(block[s.name][:, 0] - at[s.name]).flatten(1) for s in model.network.sites]
        away.append(torch.cat(ways, 1))
        given.append({name: block[name] for name in own})
        count += len(away[-1])
        if count * away[-1][0].nbytes >= MAX_BYTES:
            yield count, partial(_predictive, model, at, away, given)
            away.clear()
            given.clear()
            count = 0
    if count:
        yield count, partial(_predictive, model, at, away, given)


def _predictive(
    model: Model,
    at: Mapping[str, Tensor],
    away: Sequence[Tensor],
    given: Sequence[Mapping[str, Tensor]],
    batch: Batch,
) -> TorchDistribution:
    sites, count = model.network.sites, len(batch)
    leaves = [at[s.name].expand(count, 1, *s.shape).clone().requires_grad_() for s in sites]
    named = {site.name: leaf for site, leaf in zip(sites, leaves, strict=True)}
    with torch.enable_grad():
        outputs = model.outputs(named, replace(batch.split(count), labels=None))
        shape = outputs.shape[2:]  # (outputs,), or (C, outputs)
        outputs = outputs.reshape(count, -1)
        sums = outputs.sum(0).unbind()
    changes = []
    for total in sums:
        gradients = torch.autograd.grad(
            total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([gradient.reshape(count, -1) for gradient in gradients], 1)
        # Block by block, as all of them side by side would be another copy; and at full precision.
        with torch.autocast(flat.device.type, enabled=False):
            changes.append(torch.cat([part @ flat.mT for part in away]))
    moved = outputs.detach() + torch.stack(changes, -1)
    weights = {name: torch.cat([part[name] for part in given]) for name in given[0]}
    return model.likelihood.checked(
        moved.reshape(len(moved), count, *shape), weights, batch.choices
    )
