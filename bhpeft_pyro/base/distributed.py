"""Several processes for one fit or one forecast, by `torch.distributed`.

Every rank (process) holds the model and all the data, and makes the same calls. The rows of a
training batch and the batches of a forecast are divided among the ranks; afterwards all ranks hold
the same numbers. Only rank 0 writes files. Without a process group there is one rank, and nothing
here has a cost.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import ProcessError
from .threads import give_way

__all__ = ["independent", "is_main", "rank", "world"]

_APART = 1e-3  # relative difference of parameters that rounding does not explain
_PATIENCE = timedelta(days=1)  # with ranks that still fit their components

Item = TypeVar("Item")

_independent: ContextVar[bool] = ContextVar("independent", default=False)


def world() -> int:
    """The number of processes that work together; 1 if `torch.distributed` has no process group."""
    together = dist.is_available() and dist.is_initialized() and not _independent.get()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


@contextmanager
def independent() -> Iterator[None]:
    """Within the block this process works alone: it shares no work, and waits for no other process.

    >>> with independent():  # for example on rank 0 only, or to fit another model on each rank
    ...     world(), is_main()
    (1, True)
    """
    before = _independent.set(True)
    try:
        yield
    finally:
        _independent.reset(before)


@contextmanager
def from_environment() -> Iterator[None]:
    """Within the block, the process group for which `torchrun` or `accelerate launch` has set the
    environment."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _answered():
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: others may wait in it


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all ranks, with one all-reduce."""
    if world() == 1:
        return
    flat = torch.cat([tensor.detach().to(tensors[0]).flatten() for tensor in tensors])
    with _answered():
        dist.all_reduce(flat)
    means = (flat / world()).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def map_over_ranks(
    items: Iterable[Item], compute: Callable[[Item], Iterable[Tensor]]
) -> Iterator[tuple[Item, Iterable[Tensor]]]:
    """Compute something for each item, on one rank each; all ranks get all results, in order.

    An error on one rank is raised on all of them.

    Args:
        items: the same on every rank.
        compute: from an item to tensors. It must not use the global random state, which would
            then differ between ranks.
    """
    count, number, left = world(), rank(), iter(items)
    if count == 1:
        for item in left:
            give_way()
            yield item, compute(item)
        return
    while group := [*islice(left, count)]:
        give_way()
        values: list[Tensor] = []
        error: Exception | None = None
        try:
            values += compute(group[number]) if number < len(group) else ()
        except Exception as raised:
            error = raised
        heads = gathered((error, [(v.shape, v.dtype, v.device.type) for v in values]))
        if failed := [other for other, _ in heads if other is not None]:
            raise error or failed[0]
        for owner, (item, (_, kinds)) in enumerate(zip(group, heads, strict=False)):
            mine = values if owner == number else [None] * len(kinds)
            yield item, [_sent(v, owner, *kind) for v, kind in zip(mine, kinds, strict=True)]


class Ranks(Executor):
    """Runs each job on one rank, in turn; all ranks submit the same jobs, which return bytes, and
    get all results."""

    def __init__(self) -> None:
        self._jobs = 0

    def submit(self, job: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        owner = self._jobs % world()
        self._jobs += 1
        data = b""
        if owner == rank():
            with independent():
                data = job(*args, **kwargs)
        return _FromRank(owner, data)


class _FromRank(Future[Any]):
    """Bytes that one rank has."""

    def __init__(self, owner: int, data: bytes) -> None:
        super().__init__()
        self._owner, self._data = owner, bytearray(data)

    def result(self, timeout: float | None = None) -> bytes:
        shape = torch.Size([gathered(len(self._data))[self._owner]])
        held = torch.frombuffer(self._data, dtype=torch.uint8) if self._data else None
        return _sent(held, self._owner, shape, torch.uint8, "cpu").numpy().tobytes()


def agree(what: str, *values: Tensor | str) -> None:
    """Check that all ranks were given the same values."""
    if world() == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else value.cpu().numpy().tobytes())
    digests = gathered(digest.hexdigest())
    if other := [number for number, one in enumerate(digests) if one != digests[0]]:
        raise ProcessError(
            f"{what}: not the same on rank {other[0]} as on rank 0; expected the same on all "
            "ranks, which share the work out themselves (within "
            "bhpeft_pyro.base.distributed.independent() each works for itself)"
        )


def same(module: nn.Module, trained: bool = False) -> None:
    """Give every rank the state that a module has on rank 0. If it is `trained`, all ranks took the
    same steps: it is an error if parameters differ by more than rounding."""
    if world() == 1:
        return
    norms = torch.tensor(gathered([value.norm().item() for value in module.parameters()]))
    if trained and not torch.allclose(norms, norms[:1], _APART, equal_nan=True):
        raise ProcessError(
            "guide: the ranks did not take the same steps; expected the same guide and optimizer "
            "on all of them"
        )
    state = module.state_dict()
    module.load_state_dict(
        {k: _sent(v, 0, v.shape, v.dtype, v.device.type) for k, v in state.items()}
    )


def gathered(value: Item) -> list[Item]:
    """A small object from every rank."""
    values = [value] * world()
    if len(values) > 1:
        with _answered():
            dist.all_gather_object(values, value)
    return values


def _sent(
    value: Tensor | None, owner: int, shape: torch.Size, dtype: torch.dtype, kind: str
) -> Tensor:
    """A tensor that rank `owner` has, on a device of this kind."""
    able = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    by = kind if kind in able else able[0]  # NCCL alone cannot send from the CPU
    held = torch.empty(shape, dtype=dtype, device=by)
    if rank() == owner and value is not None:
        held.copy_(value)
    with _answered():
        dist.broadcast(held, owner)
    return held.to(kind)


@contextmanager
def _answered() -> Iterator[None]:
    """Explain the error if other ranks do not answer."""
    try:
        yield
    except RuntimeError as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise ProcessError(
            "another process of this job has ended, or did not make the same calls as this one; "
            f"its own message says why. What was saved is unchanged ({reason:.200})"
        ) from error
