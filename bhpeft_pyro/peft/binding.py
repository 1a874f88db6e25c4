"""Which PEFT weights are in force, in this thread, for which backbone.

Hooks and the attention function are permanent and inert: they look up `active()` and do nothing
unless a binding of their own attachment is in it. The context variable is per thread, so one
thread's weights are never seen by another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError

__all__ = ["Binding", "activate", "active", "install", "new_token", "restore"]

Before = Callable[[Tensor], None]
"""Sees a module's input."""
After = Callable[[Tensor, Tensor], Tensor]
"""Gets a module's input and output, returns the output to use instead."""
Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gets an attention module's keys and values (R, heads, T, head dim); may prepend some."""

_NOTHING: Mapping[int, Binding] = MappingProxyType({})
_ACTIVE: ContextVar[Mapping[int, Binding]] = ContextVar("bhpeft_active", default=_NOTHING)
new_token = count().__next__


class Binding:
    """The weights of one `Attachment.bind`, as functions by module.

    Attributes:
        token: the attachment's number; hooks carry it and react to no other binding.
        base: the backbone; an inner binding on the same one hides an outer one.
        particles: S; row r of R belongs to particle r // (R // S).
        mask: (R, T), 1 or True for real tokens, or None if all are.
        dtype: what the transformer computes in; weights are cast to it once, stacked.
        before, after, attend: what to do at a module's input, at its output, in attention.
        content: for modules that also project other things than hidden states (DeBERTa's
            relative positions), the attention module whose input they must get to count.
        layers: the layers whose gradient checkpointing has to bring this binding back.
        scratch: what one module's hook leaves for another's in the same layer.
        padded: masks already widened for a prefix, so that layers share the work.
    """

    def __init__(
        self,
        token: int,
        base: nn.Module,
        particles: int,
        mask: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.token = token
        self.base = base
        self.particles = particles
        self.mask = mask
        self.dtype = dtype
        self.before: dict[nn.Module, list[Before]] = {}
        self.after: dict[nn.Module, list[After]] = {}
        self.attend: dict[nn.Module, Attend] = {}
        self.content: dict[nn.Module, nn.Module] = {}
        self.layers: frozenset[nn.Module] = frozenset()
        self.scratch: dict[Any, Tensor] = {}
        self.padded: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def add_before(self, module: nn.Module, function: Before) -> None:
        self.before.setdefault(module, []).append(function)

    def add_after(self, module: nn.Module, function: After) -> None:
        self.after.setdefault(module, []).append(function)

    def rows_per_particle(self, rows: int) -> int:
        """R // S, or an error if the particles cannot share the rows equally."""
        if rows % self.particles:
            raise ConfigError(
                f"the backbone was run on {rows} rows, which {self.particles} particles cannot "
                "share equally: the number of rows must be a multiple of the weights' first "
                "dimension"
            )
        return rows // self.particles


def active() -> Mapping[int, Binding]:
    """The bindings in force in this thread, by their attachment's token."""
    return _ACTIVE.get()


class restore:
    """Put exactly these bindings in force (for a recomputation in the backward pass).

    May be entered again and again, as several backward passes through one graph recompute it.
    """

    def __init__(self, bindings: Mapping[int, Binding]) -> None:
        self._bindings = bindings
        self._tokens: list[Token[Mapping[int, Binding]]] = []

    def __enter__(self) -> None:
        self._tokens.append(_ACTIVE.set(self._bindings))

    def __exit__(self, *_: object) -> None:
        _ACTIVE.reset(self._tokens.pop())


def activate(binding: Binding) -> restore:
    """Put `binding` in force, instead of any other on the same backbone."""
    others = {t: b for t, b in _ACTIVE.get().items() if b.base is not binding.base}
    return restore({**others, binding.token: binding})


def _hidden_states(binding: Binding, module: nn.Module, x: Tensor) -> bool:
    """False if this call projects something else than the layer's hidden states."""
    attention = binding.content.get(module)
    return attention is None or binding.scratch.get(attention) is x


def _note(token: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    binding = _ACTIVE.get().get(token)
    if binding is not None:
        binding.scratch[module] = args[0]


def _before(token: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    binding = _ACTIVE.get().get(token)
    if binding is None:
        return
    functions = binding.before.get(module)
    if functions is not None and _hidden_states(binding, module, args[0]):
        for function in functions:
            function(args[0])


def _after(token: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
    binding = _ACTIVE.get().get(token)
    if binding is None:
        return None
    functions = binding.after.get(module)
    if functions is None or not _hidden_states(binding, module, args[0]):
        return None
    for function in functions:
        output = function(args[0], output)
    return output


def install(binding: Binding) -> list[RemovableHandle]:
    """Register the inert hooks that a binding of this shape needs.

    The hooks are partials of module-level functions over a number: they keep neither attachment
    nor weights alive, and a backbone with hooks can still be copied and pickled.
    """
    token = binding.token
    noted = set(binding.content.values())
    hooked = [module.register_forward_pre_hook(partial(_note, token)) for module in noted]
    hooked += [
        module.register_forward_pre_hook(partial(_before, token)) for module in binding.before
    ]
    hooked += [module.register_forward_hook(partial(_after, token)) for module in binding.after]
    return hooked
