"""Ray as a `concurrent.futures.Executor`, for `fit(..., executor=RayExecutor())`.

It needs the extra `ray`, and this package on every machine of the cluster. Ray itself has no such
executor (ray-project/ray issue 29456).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from ..base.checks import optional_library

__all__ = ["RayExecutor"]

ray = optional_library("ray", "ray")


class RayExecutor(Executor):
    """Makes each call a task of Ray, on the cluster of `ray.init`, or a new one on this machine.

    Ray repeats a task whose worker was killed, by default up to three times.

    Args:
        options: of each task, as for `ray.remote`: `num_cpus=4`, `num_gpus=1`, `max_retries=10`.

    >>> RayExecutor(num_cpus=1).submit(pow, 2, 5).result()
    32
    >>> ray.shutdown()
    """

    def __init__(self, **options: Any) -> None:
        self._run = ray.remote(_run).options(**options)
        self._last: tuple[object, Any] = None, None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a task; cancelling its future cancels it if it has not begun."""
        if fn is not self._last[0]:  # what a partial holds is stored once for many tasks
            self._last = fn, ray.put(fn)
        task = self._run.remote(self._last[1], *args, **kwargs)
        future: Future[Any] = task.future()
        future.add_done_callback(lambda done: ray.cancel(task) if done.cancelled() else None)
        return future


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
