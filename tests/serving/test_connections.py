"""Connections that let the service wait are closed, and others are answered meanwhile."""

from __future__ import annotations

import logging
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import pytest
from services import LIMITS, listening, until
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from bhpeft_pyro.serving.connections import Connection, room_for
from bhpeft_pyro.serving.server import Service

HOW = {"http": Connection, "log_level": "warning", "log_config": None}
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "seconds", 0.3)
    monkeypatch.setattr(Connection, "_told", -60.0)


@pytest.fixture
def address(source, april) -> Iterator[str]:
    app = Service(source, april, LIMITS).application
    with listening(app, limit_concurrency=8, timeout_keep_alive=1, **HOW) as where:
        yield where


def connect(address: str) -> socket.socket:
    where = urlsplit(address)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=10)


def ended(connection: socket.socket) -> bool:
    """Whether the other side closes it, within ten seconds; what it sends before is left out."""
    with suppress(ConnectionError):
        while connection.recv(1_000_000):
            pass
    return True


def answer(connection: socket.socket) -> bytes:
    connection.sendall(GET)
    return connection.recv(1000)


@pytest.mark.parametrize("sent", [b"", b"GET", GET[:-2], GET + b"GET /health", b"\r\n"])
def test_one_without_a_whole_request_is_closed(address, sent) -> None:
    with connect(address) as connection:
        connection.sendall(sent)
        assert ended(connection)


def test_headers_that_trickle_have_no_more_time(address) -> None:
    with connect(address) as connection:
        connection.sendall(GET[:-2])
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < began + 5:
                connection.sendall(b"a: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() < began + 2


def test_a_request_that_is_answered_has_its_time(address, monkeypatch) -> None:
    with connect(address) as connection:
        for _ in range(3):
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.2)
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 16\r\n\r\n")
        time.sleep(0.6)  # the time of a body is the application's
        connection.sendall(b'{"inputs": "w5"}')
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_many_that_send_nothing_keep_nobody_out_and_fill_no_log(
    address, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(Connection, "seconds", 60.0)
    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        silent = [stack.enter_context(connect(address)) for _ in range(50)]
        for connection in silent[:43]:
            assert ended(connection)
        with connect(address) as connection:
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
    assert [record.message for record in caplog.records if "closed" in record.message] == [
        "closed a connection: there were 8; others in the next minute are not logged"
    ]


def body_that_does_not_end(address: str, head: bytes) -> int:
    """How many bytes of it are taken."""
    sent = 0
    with connect(address) as connection:
        connection.sendall(head)
        with suppress(ConnectionError):
            while sent < 200_000_000:
                sent += connection.send(b" " * 100_000)
    return sent


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\norigin: x\r\ncontent-length: 9999999999\r\n\r\n",
    ],
)
def test_a_body_that_was_refused_is_not_read_on(address, head, monkeypatch) -> None:
    monkeypatch.setattr(Connection, "seconds", 60.0)
    assert body_that_does_not_end(address, head) < 100_000_000


def test_a_client_that_sends_a_little_too_much_reads_why(address) -> None:
    """Closing at once would take the answer from it."""
    with connect(address) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n")
        time.sleep(0.1)
        connection.sendall(b" " * 500_000)
        time.sleep(0.1)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert answer(connection)


def test_a_client_that_reads_nothing_is_closed(caplog) -> None:
    app = Starlette(routes=[Route("/", lambda _: Response(b" " * 30_000_000))])
    with listening(app, **HOW) as address, connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: "the client read no answers" in caplog.text)
        assert ended(connection)


@pytest.mark.parametrize(
    ("limits", "most", "files"),
    [
        ((1024, 1 << 20), 1088, 4416),
        ((1024, resource.RLIM_INFINITY), 1088, 4416),
        ((1 << 20, 1 << 20), 1088, 1 << 20),
        ((resource.RLIM_INFINITY,) * 2, 1088, resource.RLIM_INFINITY),
        ((256, 1024), 240, 1024),
        ((60, 60), 2, 60),
    ],
)
def test_as_many_files_as_connections_may_be_open(monkeypatch, limits, most, files) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.append(new))
    assert room_for(512) == most and now[-1] == (files, limits[1])
