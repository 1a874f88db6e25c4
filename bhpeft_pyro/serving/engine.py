"""A round that answers requests from many threads, one batch at a time, and can be exchanged.

What waits is answered at once: there is no window in which the engine hopes for more requests.
While one batch is predicted others arrive, and become the next. A request is never split, so one
round answers all of it, and an exchange of rounds leaves requests that have begun to the old one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread

import torch

from ..base.values import Count, Positive, checked_dataclass
from ..data import Examples
from ..errors import BHPEFTError
from .requests import Refused
from .rounds import Row, Served, Table

__all__ = ["Engine", "Limits"]

_TOGETHER = 256  # texts that are predicted together
Answered = tuple[Sequence[Row], Served]
"""The answers to a request, one for each row of its table, and the round that gave them all."""
Noted = Callable[[int, int, float], object]
_LOG = logging.getLogger(__name__)


@checked_dataclass
class Limits:
    """What a service takes on; what is beyond is refused at once.

    Attributes:
        requests: at the same time, including those whose body is still being read.
        texts: of a request.
        tokens: of a request, with padding: texts times tokens of the longest, times the most
            choices.
        bytes: of a request's body.
        seconds: that a request may take, from its first byte to its answer.

    Raises:
        ConfigError: one of them is not above 0, or not finite.
    """

    requests: Count = 512
    texts: Count = 64
    tokens: Count = 16_384
    bytes: Count = 2_000_000
    seconds: Positive = 30.0


@dataclass(eq=False)
class _Job:
    """A request in the queue."""

    table: Table
    truncate: bool
    future: Future[Answered] = field(default_factory=Future)

    @property
    def count(self) -> int:
        return len(next(iter(self.table.values())))


class Engine:
    """Answers requests with a round, in a thread of its own between `start` and `close`.

    Attributes:
        served: the round that answers.
        before: the round that did before, for `roll_back`; None if there was none.
        limits: what it takes on.
        noted: called with each batch that was predicted: how many texts, how many tokens with
            padding, and how many seconds it took.

    >>> from pathlib import Path
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> engine = Engine(Served(posterior, Path("runs/march")), Limits())
    >>> engine.start()
    >>> rows, served = engine.ask({"text": ["w5 w20", "w6 w30"]}).result()
    >>> len(rows), served.id == posterior.report.id
    (2, True)
    >>> engine.close()
    """

    def __init__(self, served: Served, limits: Limits, noted: Noted = lambda *_: None) -> None:
        self.served, self.limits, self.noted = served, limits, noted
        self.before: Served | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._thread = Thread(target=self._work, name="bhpeft-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, once all that waits is answered."""
        if self._thread is not None and self.alive:
            self._queue.put(None)
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, table: Table, *, truncate: bool = True) -> Future[Answered]:
        """Put a request into the queue.

        Args:
            table: with the columns that the round reads, all of one length.
            truncate: cut texts that are too long; else they are refused.

        Returns:
            What will be answered, or raise `Refused`. If it is cancelled before its batch begins,
            nothing is predicted.
        """
        job = _Job(table, truncate)
        if job.count > self.limits.texts:
            raise Refused(413, f"{job.count} texts; expected {self.limits.texts} at most")
        self._queue.put(job)
        return job.future

    def exchange(self, served: Served) -> None:
        """Let another round answer. Requests of the batch that runs end on the old one."""
        if served.id != self.served.id:  # the same one, loaded anew, is no step to go back
            self.before = self.served
        self.served = served

    def roll_back(self) -> None:
        """Let the round answer that did before the last exchange; again, and the last one does."""
        if self.before is None:
            raise Refused(422, "there is no round before this one")
        self.exchange(self.before)

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            jobs, texts = [first], first.count
            while texts < _TOGETHER and not self._queue.empty():
                if (job := self._queue.get()) is None:
                    self._queue.put(None)  # the end, once these are answered
                    break
                jobs.append(job)
                texts += job.count
            if jobs := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
                self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer requests with the round of this moment; one at fault fails alone."""
        served = self.served
        try:
            rows = self._predict(jobs, served)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(_refusal(error))
                return
            half = len(jobs) // 2
            self._answer(jobs[:half])
            self._answer(jobs[half:])
            return
        ends = accumulate(job.count for job in jobs)
        for job, end in zip(jobs, ends, strict=True):
            job.future.set_result((rows[end - job.count : end], served))

    def _predict(self, jobs: Sequence[_Job], served: Served) -> list[Row]:
        """The answers to all rows of these requests."""
        for job in jobs:
            if not job.truncate:
                _check_lengths(job.table, served)
        names = jobs[0].table
        table = {name: [cell for job in jobs for cell in job.table[name]] for name in names}
        examples = served.encode(table)
        end = 0
        for job in jobs:
            start, end = end, end + job.count
            check_tokens(examples, slice(start, end), self.limits.tokens)
        began = time.perf_counter()
        rows = served.answer(examples)
        tokens = padded(examples, slice(None))
        self.noted(len(rows), tokens, time.perf_counter() - began)
        return rows


def _refusal(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, BHPEFTError):
        return Refused(422, str(error))
    _LOG.error("a request failed", exc_info=error)
    return Refused(424, "the prediction failed; the server's log says why")


def _check_lengths(table: Table, served: Served) -> None:
    """Refuse texts that would be cut."""
    if served.limit is not None and (longest := served.longest(table)) > served.limit:
        raise Refused(
            413, f"a text has {longest} tokens; expected {served.limit} at most, or truncate"
        )


def check_tokens(examples: Examples, rows: slice, limit: int) -> None:
    """Refuse rows of more tokens than this."""
    if (tokens := padded(examples, rows)) > limit:
        raise Refused(413, f"{tokens} tokens with padding; expected {limit} at most")


def padded(examples: Examples, rows: slice) -> int:
    """The tokens of some rows, each padded to their longest text and their most choices."""
    lengths, counts = examples.lengths[rows], examples.counts
    choices = torch.ones_like(lengths) if counts is None else counts[rows]
    return len(lengths) * int(lengths.max()) * int(choices.max())
