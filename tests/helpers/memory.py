"""What a computation takes: the tensors that it makes, and how much of them is held at once."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Counts within a `with` block.

    Args:
        collected: without what only the garbage collector frees; else with all of it.

    Attributes:
        largest: entries of the largest tensor made.
        peak: the most bytes held at once, of tensors made within.
    """

    def __init__(self, collected: bool = True) -> None:
        super().__init__()
        self._collected = collected
        self.largest = self.peak = self._held = 0
        self._known: dict[int, int] = {}

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()  # only what is made within is looked through
        gc.disable()  # or counts would depend on when the collector last ran by itself
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.enable()
        gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for made in _tensors(result):
            storage = made.untyped_storage()
            if storage._cdata in given or storage._cdata in self._known:
                continue  # a view, or changed in place
            self.largest = max(self.largest, made.numel())
            self._known[storage._cdata] = storage.nbytes()
            self._held += storage.nbytes()
            if self._held > self.peak:
                if self._collected:
                    gc.collect()
                self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self._held -= self._known.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
