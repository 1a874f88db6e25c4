"""Components as jobs of a `concurrent.futures.Executor`: processes, Dask, Ray.

A job takes bytes and returns bytes. Functions that a worker cannot import, such as those of a
notebook, are pickled by value; what the caller has anyway is pickled as a number. So the
transformer does not come back with every component, and all components share the caller's.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from traceback import format_exc
from typing import TYPE_CHECKING, Any

import cloudpickle

from ..base.isolation import locked, wait_for
from ..base.progress import bars
from ..errors import BHPEFTError, ConfigError, FitError

if TYPE_CHECKING:
    from .mixture import Fitted
    from .round import Round


def _pickled(value: object, shared: Sequence[object] = ()) -> bytes:
    numbers = {id(thing): number for number, thing in enumerate(shared)}

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            return numbers.get(id(value))

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpickled(data: bytes, shared: Sequence[object] = ()) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> object:
            return shared[number]

    return Unpickler(io.BytesIO(data)).load()


def in_workers(executor: Executor, rounds: Sequence[Round]) -> Iterator[Fitted]:
    """What rounds have fitted, in order, from the workers of an executor.

    Raises:
        ConfigError: something cannot be pickled, or the executor takes no jobs.
        FitError: after the last result: the first error of a round, or that a worker ended.
    """
    # What is within a round, and its result need not bring back.
    stay = [[x.model.network, x.model.prior, x.first_prior, x.data, x.held_out] for x in rounds]
    # What all rounds have is sent once.
    shared = [same[0] for same in zip(*stay, strict=True) if all(x is same[0] for x in same)]
    futures: list[Future[bytes]] = []
    failed: Exception | None = None
    try:
        try:
            job = partial(_job, _pickled(shared))
            for pair in zip(rounds, stay, strict=True):
                futures.append(executor.submit(job, _pickled(pair, shared)))
        except Exception as error:  # of the objects' own code, or of the executor
            raise ConfigError(f"executor: a fit cannot be sent to its worker: {error}") from error
        for number, future in enumerate(futures):
            try:
                wait_for(future)
                data = future.result()
            except Exception as error:  # each executor has its own
                ended = f"component {number + 1} of {len(rounds)}: its worker failed: {error!r}"
                failed = failed or FitError(ended)
                continue
            result = _unpickled(data, [*shared, *stay[number]])
            if isinstance(result, Exception):
                failed = failed or result
            else:
                yield result
    finally:
        for future in futures:
            future.cancel()
    if failed is not None:
        raise failed


def _job(common: bytes, pair: bytes) -> bytes:
    shared = _unpickled(common)
    one, stay = _unpickled(pair, shared)
    try:
        with locked(), bars(False):  # the worker may be a thread
            result = one.run()
    except Exception as error:
        if not isinstance(error, BHPEFTError):
            error.add_note(f"In the worker:\n{format_exc()}")
        result = error
    return _pickled(result, [*shared, *stay])
