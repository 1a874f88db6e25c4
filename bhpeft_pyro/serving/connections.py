"""Connections of uvicorn that end: uvicorn itself closes only those between two requests.

One that sends nothing, or headers without end, would stay for ever, and a thousand of them leave no
file to open for anybody else. The same holds for a client that reads no answers, and for a body
that is sent on after its request was refused.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection", "room_for"]

_FILES = 64  # that a service opens beside its connections
_MINUTE = 60.0
_LOG = logging.getLogger("uvicorn.error")  # which is shown at this level


def room_for(requests: int) -> int:
    """How many connections to keep, and to let wait, for so many requests at once: more, so that
    others are told that it is too much. The process may open as many files afterwards, or there are
    fewer connections where the system does not let it.

    asyncio takes all that wait before it closes one, and logs each for which no file is left.
    """
    most = 2 * requests + _FILES
    if sys.platform == "win32":
        return most
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

    need = 4 * most + _FILES  # those kept, taken, being closed, and taken meanwhile
    soft, hard = (need if n == RLIM_INFINITY else n for n in getrlimit(RLIMIT_NOFILE))
    if soft < min(need, hard):
        soft = min(need, hard)
        setrlimit(RLIMIT_NOFILE, (soft, getrlimit(RLIMIT_NOFILE)[1]))
    return max(2, min(most, (soft - _FILES) // 4))


class Connection(H11Protocol):
    """A connection that is closed if a client lets it wait.

    It is idle until all headers of a request have come, and again after the response. With
    uvicorn's `limit_concurrency`, a connection beyond it closes the one that has been idle longest:
    so some that send nothing do not keep others out.

    Attributes:
        seconds: from the first byte of a request to its last header; from a new connection to
            that; and until a client reads on.
        rest: bytes that are read while it is idle, as of a body whose request was refused. Closing
            at once would take the answer from a client that is still sending.
    """

    seconds: ClassVar[float] = 10.0
    rest: ClassVar[int] = 1_000_000
    _told: ClassVar[float] = -_MINUTE  # when a line was logged

    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0  # idle since then
    _read = 0  # bytes, since it is idle

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._begin("no request came")
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) >= limit:
            others = [one for one in self.connections if isinstance(one, Connection) and one._idle]
            min(others, key=lambda one: one._since)._drop(f"there were {limit}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read += len(data) if self._idle else 0
        super().data_received(data)
        if not self._idle and not self.flow.write_paused:
            self._end()
        elif self._read > self.rest:
            self._drop("what was refused did not end")
        else:
            self._begin("no request came")

    def on_response_complete(self) -> None:
        self._since, self._read = self.loop.time(), 0
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin("the client read no answers")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # `close` would wait for a client that does not read

    def _begin(self, why: str) -> None:
        """Close it in some seconds, unless this was begun before."""
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.seconds, self._drop, why)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _drop(self, why: str) -> None:
        """Close it; a line a minute says so, or an attacker would fill the disk."""
        self._end()
        self.connections.discard(self)
        self.transport.abort()
        now = self.loop.time()
        if now >= Connection._told + _MINUTE:
            Connection._told = now
            _LOG.warning("closed a connection: %s; others in the next minute are not logged", why)
