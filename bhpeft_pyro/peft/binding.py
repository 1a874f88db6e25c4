"""The PEFT weights that are in force, in this thread, for each backbone.

Hooks and the attention function are permanent and inert: they look up the active bindings and do
nothing without one of their own attachment. The context variable is per thread, so one thread never
sees another's weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import ismethod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError

Before = Callable[[Tensor], Tensor | None]
"""Gets a module's input, may return another to use instead."""
After = Callable[[Tensor, Tensor], Tensor]
"""Gets a module's input and output, returns the output to use instead."""
Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gets an attention module's keys and values (R, heads, T, head dim); may prepend some."""


@dataclass(eq=False)
class Binding:
    """The weights of one `Attachment.bind`, as functions by module.

    Attributes:
        token: the attachment's number; its hooks react to no other binding.
        base: the backbone; an inner binding on the same one hides an outer one.
        particles: S; row r of R belongs to particle r // (R // S).
        mask: (R, T), 1 or True for real tokens, or None if all are.
        dtype: what the transformer computes in; weights are cast to it once, stacked.
        skipped: layers that return their input, and beside it what `Scales.beside` says, instead of
            computing.
        before, after, attend: what to do at a module's input, at its output, in attention.
        content: for modules that also project other things than hidden states (DeBERTa's
            relative positions), the attention module whose input they must get to count.
        scratch: what one module's hook leaves for another's in the same layer.
        padded: masks already padded for a prefix, so that layers share one in memory.
    """

    token: int
    base: nn.Module
    particles: int
    mask: Tensor | None
    dtype: torch.dtype = torch.float32
    skipped: Mapping[nn.Module, tuple[object, ...] | None] = field(default_factory=dict)
    before: dict[nn.Module, list[Before]] = field(default_factory=partial(defaultdict, list))
    after: dict[nn.Module, list[After]] = field(default_factory=partial(defaultdict, list))
    attend: dict[nn.Module, Attend] = field(default_factory=dict)
    content: dict[nn.Module, nn.Module] = field(default_factory=dict)
    scratch: dict[Any, Tensor] = field(default_factory=dict)
    padded: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def rows_per_particle(self, rows: int) -> int:
        """R // S, or an error if the particles cannot share the rows equally."""
        if rows % self.particles:
            raise ConfigError(
                f"the backbone was run on {rows} rows, which {self.particles} particles cannot "
                "share equally: the number of rows must be a multiple of the weights' first "
                "dimension"
            )
        return rows // self.particles


_NOTHING: Mapping[int, Binding] = MappingProxyType({})
_ACTIVE: ContextVar[Mapping[int, Binding]] = ContextVar("bhpeft_active", default=_NOTHING)


def active() -> Mapping[int, Binding]:
    """The bindings in force in this thread, by their attachment's token."""
    return _ACTIVE.get()


@contextmanager
def activate(binding: Binding) -> Iterator[None]:
    """Put `binding` in force, instead of any other on the same backbone."""
    others = {t: b for t, b in _ACTIVE.get().items() if b.base is not binding.base}
    before = _ACTIVE.set({**others, binding.token: binding})
    try:
        yield
    finally:
        _ACTIVE.reset(before)


def install(binding: Binding) -> list[RemovableHandle]:
    """Register the inert hooks that a binding with these modules needs.

    The hooks are partials of module-level functions over a number: they keep neither attachment
    nor weights alive, and a backbone with hooks can still be copied and pickled.
    """
    noted = set(binding.content.values())
    pairs = [(m, _note) for m in noted] + [(m, _before) for m in binding.before]
    handles = [
        m.register_forward_pre_hook(partial(hook, binding.token), with_kwargs=True)
        for m, hook in pairs
    ]
    return handles + [
        m.register_forward_hook(partial(_after, binding.token)) for m in binding.after
    ]


def _hidden_states(binding: Binding, module: nn.Module, x: Tensor) -> bool:
    """False if this call projects something else than the layer's hidden states."""
    attention = binding.content.get(module)
    return attention is None or binding.scratch.get(attention) is x


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module gets first: some models call their layers by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


# PyTorch calls a hook without `kwargs` if it was removed since the module's call began, as when the
# garbage collector ends another attachment on the same backbone.


def _note(
    token: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    binding = active().get(token)
    if binding is not None and kwargs is not None:
        binding.scratch[module] = _input(args, kwargs)


def _before(
    token: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    binding = active().get(token)
    if binding is None or kwargs is None or not (functions := binding.before.get(module)):
        return None
    if _hidden_states(binding, module, _input(args, kwargs)):
        for function in functions:
            other = function(_input(args, kwargs))
            args = args if other is None else (other, *args[1:])
    return args, kwargs


def _after(token: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    binding = active().get(token)
    if binding is not None and _hidden_states(binding, module, args[0]):
        for function in binding.after.get(module, ()):
            output = function(args[0], output)
    return output


class LayerForward:
    """A layer's `forward` that computes nothing where a binding in force skips the layer.

    Hooks cannot replace what a module computes, so `forward` is assigned, as Accelerate does it. A
    class, not a closure, so that copying or pickling the backbone takes the module along.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Callable[..., Any] = module.forward
        module.forward = self

    def remove(self) -> None:
        """Take it off its module, unless something else was put there since."""
        if self.module.forward is not self:
            return
        if ismethod(self.forward):  # the class's, which shows again
            del self.module.forward
        else:
            self.module.forward = self.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for binding in active().values():
            if self.module in binding.skipped:
                beside = binding.skipped[self.module]
                return args[0] if beside is None else (args[0], *beside)
        return self.forward(*args, **kwargs)
