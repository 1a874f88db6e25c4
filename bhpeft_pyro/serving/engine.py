"""A round that answers requests from many threads, one batch at a time, and can be exchanged.

What waits is answered at once: there is no window in which the engine hopes for more requests.
While one batch is predicted others arrive, and become the next. A request is never split, so one
round answers all of it, and an exchange of rounds leaves requests that have begun to the old one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ..base.values import Count, Positive, checked_dataclass
from ..data import Examples
from ..errors import BHPEFTError
from .answers import Answer
from .loading import Served, Table

__all__ = ["Answered", "Engine", "Limits", "Refused"]

_TOGETHER = 256  # texts that are tokenised together
Noted = Callable[[int, int, float], object]
_LOG = logging.getLogger(__name__)


@checked_dataclass
class Limits:
    """What a service takes on; what is beyond is refused at once.

    Attributes:
        requests: at the same time, including those whose body is still being read.
        texts: of a request.
        tokens: of a request, and of what is predicted together, with padding: texts times tokens
            of the longest, times the most choices.
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


class Refused(Exception):
    """A request that is not answered, with the HTTP status that says whose fault it is: 401 no
    token, 403 from a web page, 404 another version, 413 too large, 415 no JSON, 422 cannot be read,
    424 the prediction failed, 429 too much to do, 503 not ready, or the disk cannot be used."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Answered:
    """The answers to a request.

    Attributes:
        rows: one for each row of its table.
        served: the round that gave them all.
    """

    rows: Sequence[Answer]
    served: Served

    @property
    def in_full(self) -> list[dict[str, Any]]:
        """All that is said of each row, the id of the round, and why it promises nothing."""
        about: dict[str, Any] = {"round": self.served.id}
        if self.served.no_promise:
            about["no_promise"] = self.served.no_promise
        scores = ({"scores": row.scores} if row.scores else {} for row in self.rows)
        return [row.said | score | about for row, score in zip(self.rows, scores, strict=True)]


@dataclass(eq=False)
class _Asked:
    """A request in the queue."""

    table: Table
    whole: bool  # texts may not be cut
    future: Future[Answered] = field(default_factory=Future)

    @property
    def count(self) -> int:
        return len(next(iter(self.table.values())))

    def refuse(self, status: int, why: str) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(Refused(status, why))


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
    >>> answered = engine.ask({"text": ["w5 w20", "w6 w30"]}).result()
    >>> len(answered.rows), answered.served.id == posterior.report.id
    (2, True)
    >>> engine.close()
    """

    def __init__(self, served: Served, limits: Limits, noted: Noted = lambda *_: None) -> None:
        self.served, self.limits, self.noted = served, limits, noted
        self.before: Served | None = None
        self._queue: SimpleQueue[_Asked | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin to answer. Not in the constructor: a server may fork after it was made."""
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

    def ask(self, table: Table, *, whole: bool = False) -> Future[Answered]:
        """Put a request into the queue.

        Args:
            table: with the columns that the round reads, all of one length.
            whole: refuse texts that are too long, in place of cutting them.

        Returns:
            What will be answered, or raise `Refused`. If it is cancelled before its batch begins,
            nothing is predicted.
        """
        asked = _Asked(table, whole)
        if asked.count > self.limits.texts:
            raise Refused(413, f"{asked.count} texts; expected {self.limits.texts} at most")
        self._queue.put(asked)
        return asked.future

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
            asked = self._with_more(first)
            try:
                self._answer(asked)
            except Exception as error:  # a bug; it must not end the thread
                for one in asked:
                    if not one.future.done():
                        self._failed([one], error, 424)

    def _with_more(self, first: _Asked) -> list[_Asked]:
        """The first of the queue, and what else waits."""
        asked, texts = [first], first.count
        while texts < _TOGETHER and not self._queue.empty():
            more = self._queue.get()
            if more is None:
                self._queue.put(None)  # the end, once these are answered
                break
            asked.append(more)
            texts += more.count
        return asked

    def _answer(self, asked: list[_Asked]) -> None:
        """Answer requests with the round of this moment."""
        served = self.served
        asked = [one for one in asked if not one.future.cancelled()]
        try:
            asked = [one for one in asked if not (one.whole and _too_long(one, served))]
            if not asked:
                return
            tables = [one.table for one in asked]  # which have the columns of the first
            whole = {name: [cell for t in tables for cell in t[name]] for name in tables[0]}
            examples = served.encode(whole)
        except Exception as error:
            self._failed(asked, error, 422)
            return
        for group, rows, tokens in self._groups(asked, examples):
            if any(not one.future.cancelled() for one in group):
                self._predict(served, group, examples.subset(rows), tokens)

    def _groups(
        self, asked: Sequence[_Asked], examples: Examples
    ) -> Iterator[tuple[list[_Asked], list[int], int]]:
        """Requests that are predicted together, in the order in which they came: which, which rows
        of the examples are theirs, and their tokens with padding."""
        sizes, limit = sizes_of(examples), self.limits.tokens
        group: list[_Asked] = []
        rows: list[int] = []
        for one, end in zip(asked, accumulate(one.count for one in asked), strict=True):
            mine = [*range(end - one.count, end)]
            if (tokens := padded(sizes[mine])) > limit:
                one.refuse(413, f"{tokens} tokens with padding; expected {limit} at most")
                continue
            if group and padded(sizes[rows + mine]) > limit:
                yield group, rows, padded(sizes[rows])
                group, rows = [], []
            group.append(one)
            rows += mine
        if group:
            yield group, rows, padded(sizes[rows])

    def _predict(
        self, served: Served, group: list[_Asked], examples: Examples, tokens: int
    ) -> None:
        began = time.perf_counter()
        try:
            answers = served.answer(examples)
        except Exception as error:
            self._failed(group, error, 424)
            return
        self.noted(len(answers), tokens, time.perf_counter() - began)
        start = 0
        for one in group:
            rows = answers[start : start + one.count]
            start += one.count
            if one.future.set_running_or_notify_cancel():
                one.future.set_result(Answered(rows, served))

    def _failed(self, asked: list[_Asked], error: Exception, status: int) -> None:
        """Refuse the request at fault; of several, find it by halves, and answer the others."""
        asked = [one for one in asked if not one.future.done()]
        if not asked:
            return
        if len(asked) > 1:
            half = len(asked) // 2
            self._answer(asked[:half])
            self._answer(asked[half:])
        elif isinstance(error, BHPEFTError):
            asked[0].refuse(status, str(error))
        else:
            _LOG.error("a request failed", exc_info=error)
            asked[0].refuse(424, "the prediction failed; the server's log says why")


def sizes_of(examples: Examples) -> Tensor:
    """(N, 2) for each row: how many tokens its longest text has; and how many choices, 1 if it has
    none."""
    lengths, counts = examples.lengths, examples.counts
    return torch.stack([lengths, torch.ones_like(lengths) if counts is None else counts], 1)


def padded(sizes: Tensor) -> int:
    """The tokens of rows of these sizes, each padded to the longest text and the most choices."""
    return len(sizes) * int(sizes.amax(0).prod())


def _too_long(asked: _Asked, served: Served) -> bool:
    """Whether a text would be cut; the request is then refused."""
    limit = served.limit
    if limit is None or (longest := served.longest(asked.table)) <= limit:
        return False
    asked.refuse(413, f"a text has {longest} tokens; expected {limit} at most, or truncate")
    return True
