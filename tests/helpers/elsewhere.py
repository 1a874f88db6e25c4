"""A device that is not there: tensors that live on the CPU and say that they are on "lazy:0".

An operation that mixes them with tensors of the CPU raises, as on a real accelerator, and all
others compute real numbers. So a forgotten `.to(device)` shows on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

PRETENDED = (
    "lazy:0"  # of a backend that PyTorch knows but does not have; its gradients need no thread
)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_DRAWN = {
    *(torch.normal, torch.randn, torch.rand, torch.randint, torch.randperm),
    *(torch.bernoulli, torch.binomial, torch.multinomial, torch.poisson),
    *(torch._standard_gamma, torch._sample_dirichlet),
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.bernoulli_),
    *(torch.randn_like, torch.rand_like),
}
# CUDA takes indices that are on the CPU, and numbers.
_INDICES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class _There(Tensor):
    """A tensor of the pretended device, with its numbers in `kept`."""

    kept: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor) -> _There:
        new = Tensor._make_wrapper_subclass(
            cls,
            kept.size(),
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            device=PRETENDED,
        )
        new.kept = kept
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Pretend(TorchDispatchMode):
    """Makes the tensors that are asked for on the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    args_here, kwargs_here = _here(args, tensors), {k: _here(v, tensors) for k, v in kwargs.items()}
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    if len(there) < len(tensors) and there and func not in _MOVES:
        here = [t for t in tensors if not isinstance(t, _There) and t.dim()]
        if any(t.is_floating_point() or func not in _INDICES for t in here):
            raise RuntimeError(f"{func}: tensors on {PRETENDED} and on the CPU")
    goes = isinstance(args[0], _There) if func is _aten.copy_.default else bool(there)
    if (device := kwargs.get("device")) is not None:
        kwargs_here["device"], goes = "cpu", torch.device(device).type == "lazy"
    out = func(*args_here, **kwargs_here)
    if goes and func._schema.is_mutable:
        return return_and_correct_aliasing(func, args, kwargs, _wrapped(out))
    return _wrapped(out) if goes else out


def _here(value: Any, tensors: list[Tensor]) -> Any:
    """The same on the CPU; the tensors in it are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.kept if isinstance(value, _There) else value
    if isinstance(value, list | tuple):
        return [_here(each, tensors) for each in value]
    return value


def _wrapped(out: Any) -> Any:
    if isinstance(out, list | tuple):
        return tuple(map(_wrapped, out))
    return _There(out) if isinstance(out, Tensor) else out


class _NumbersOfTheCPU(TorchFunctionMode):
    """Random numbers are drawn on the CPU wherever they go, so that devices can be compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWN:
            return func(*args, **kwargs)
        tensors = [each for each in args if isinstance(each, Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        args_here = [each.cpu() if isinstance(each, Tensor) else each for each in args]
        if "device" in kwargs:
            kwargs = kwargs | {"device": "cpu"}
        drawn = func(*args_here, **kwargs)
        in_place = func.__name__.endswith("_")
        return args[0].copy_(drawn) if in_place else drawn.to(device)


@contextmanager
def at(device: str) -> Iterator[None]:
    """Work on "cpu", "cuda" or `PRETENDED`, with the same random numbers."""
    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch, _NumbersOfTheCPU():
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        if device != PRETENDED:
            yield
            return
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # it has none
        library = torch.library.Library("aten", "IMPL")  # `torch.tensor` passes the mode by
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, "Lazy")
        with _Pretend():
            yield
        library._destroy()


def _copy(source: Tensor, target: _There, non_blocking: bool = False) -> Tensor:
    target.kept.copy_(source.kept if isinstance(source, _There) else source)
    return target


_KERNELS = {
    "empty.memory_format": lambda size, dtype=None, **_: _There(torch.empty(size, dtype=dtype)),
    "empty_strided": lambda size, stride, dtype=None, **_: _There(
        torch.empty_strided(size, stride, dtype=dtype)
    ),
    "_copy_from": _copy,
}
