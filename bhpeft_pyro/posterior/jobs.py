"""Components as jobs of a `concurrent.futures.Executor`: processes, Dask, Ray.

A job takes bytes and returns bytes. Functions that a worker cannot import, such as those of a
notebook, are pickled by value; what the caller has anyway is pickled as a number. So the
transformer does not come back with every component, and all components share the caller's.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from traceback import format_exc
from typing import TYPE_CHECKING, Any

import cloudpickle

from ..base.isolation import locked, wait_for
from ..base.progress import bars
from ..errors import BHPEFTError, ConfigError, FitError

if TYPE_CHECKING:
    from ..training.loop import Setup
    from ..training.report import FitReport
    from .learn import Fitted

    Learner = Callable[[Setup, FitReport], Fitted]


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


def in_workers(
    executor: Executor, learner: Learner, jobs: Sequence[tuple[Setup, FitReport]]
) -> Iterator[Fitted]:
    """What components have learnt, in order, from the workers of an executor.

    Args:
        executor: has the workers.
        learner: what a worker calls with each of the jobs.
        jobs: what each component learns, and its report.

    Raises:
        ConfigError: something cannot be pickled, or the executor takes no jobs.
        FitError: after the last result: the first error of a component, or that a worker ended.
    """
    # What is within a job, and its result need not bring back.
    stay = [[x.model.network, x.model.prior, x.data, x.held_out] for x, _ in jobs]
    # What all jobs have is sent once.
    shared = [same[0] for same in zip(*stay, strict=True) if all(x is same[0] for x in same)]
    futures: list[Future[bytes]] = []
    failed: Exception | None = None
    try:
        try:
            job = partial(_job, _pickled(shared))
            for pair in zip(jobs, stay, strict=True):
                futures.append(executor.submit(job, _pickled((learner, *pair), shared)))
        except Exception as error:  # of the objects' own code, or of the executor
            raise ConfigError(f"executor: a fit cannot be sent to its worker: {error}") from error
        for number, future in enumerate(futures):
            try:
                wait_for(future)
                data = future.result()
            except Exception as error:  # each executor has its own
                ended = f"component {number + 1} of {len(jobs)}: its worker failed: {error!r}"
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


def _job(common: bytes, own: bytes) -> bytes:
    shared = _unpickled(common)
    learner, job, stay = _unpickled(own, shared)
    try:
        with locked(), bars(False):  # the worker may be a thread
            result = learner(*job)
    except Exception as error:
        if not isinstance(error, BHPEFTError):
            error.add_note(f"In the worker:\n{format_exc()}")
        result = error
    return _pickled(result, [*shared, *stay])
