"""The service: its paths, what it refuses, and the exchange of rounds.

Prediction has a thread of its own (`engine`), so that the event loop always answers `/health` and
refuses at once what is too much. An error has the status that clients of Text Embeddings Inference
expect, and the body `{"error": ..., "error_type": ...}`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..base.checks import shown
from ..errors import BHPEFTError
from . import feedback, protocols
from .engine import Answered, Engine, Limits, Refused
from .loading import Served, Source
from .measures import Measures
from .protocols import Question

__all__ = ["Service"]

Read = Callable[[Any, Served], Question]
Endpoint = Callable[[Request], Awaitable[Response]]

_LOG = logging.getLogger("uvicorn.error")  # which is shown at this level
_GONE = 499  # nobody reads it; nginx has the number for a client that closed its request
_TYPES = {
    401: "Unauthorized",
    403: "Unauthorized",
    422: "Tokenizer",
    424: "Backend",
    429: "Overloaded",
    503: "Unhealthy",
}
_ROUND = "x-bhpeft-round"


class Service:
    """What the paths of an application share.

    Args:
        source: where rounds come from.
        served: the round that answers first.
        limits: what is taken on.
        token: with which rounds are exchanged; None if nobody may.

    Attributes:
        name: of the model in the Open Inference Protocol, from that of the folder.
        running: how many requests are being read, queued or answered.

    >>> from pathlib import Path
    >>> from starlette.testclient import TestClient
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> run = Path("runs/march")
    >>> service = Service(Source(run), Served(posterior, run), Limits())
    >>> with TestClient(service.application) as client:
    ...     response = client.post("/predict", json={"inputs": ["w5 w20", "w6 w30"]})
    >>> response.status_code, len(response.json())
    (200, 2)
    """

    def __init__(
        self, source: Source, served: Served, limits: Limits, token: str | None = None
    ) -> None:
        self.source, self.limits, self.token = source, limits, token
        self.name = re.sub(r"[^\w.-]", "-", source.run.resolve().name)
        self.measures = Measures()
        self.engine = Engine(served, limits, self.measures.batch)
        self.feedback = feedback.Feedback(served, limits.tokens)
        self.running = 0
        self._exchange, self._labelling = asyncio.Lock(), asyncio.Lock()

    @property
    def application(self) -> Starlette:
        """The application, for any ASGI server."""
        model = f"/v2/models/{self.name}"
        asked: dict[str, Read] = {
            "/predict": protocols.predict,
            "/invocations": protocols.invocations,
            f"{model}/infer": partial(protocols.infer, self.name),
        }
        read: dict[str, Endpoint] = {
            "/health": self._health,
            "/ready": self._ready,
            "/info": self._info,
            "/metrics": self._metrics,
            "/ping": self._health,
            "/feedback": self._labels_so_far,
            "/v2": self._about_server,
            "/v2/health/live": self._health,
            "/v2/health/ready": self._ready,
            model: self._about_model,
            f"{model}/ready": self._ready,
        }
        posted: dict[str, Endpoint] = {
            "/admin/swap": self._refusing(self._swap),
            "/admin/rollback": self._refusing(self._roll_back),
            "/feedback": self._limited("/feedback", self._take_labels),
        }
        for path, reader in asked.items():
            posted[path] = self._limited(path, partial(self._answered, reader))
        routes = [Route(path, self._refusing(endpoint)) for path, endpoint in read.items()]
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posted.items()]
        return Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _no_path}
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.close)

    def _limited(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint of a path whose requests are limited, counted and timed."""

        async def limited(request: Request) -> Response:
            if "origin" in request.headers:  # or any page in a browser here could post labels
                raise Refused(403, "a web page sent this (header 'origin'); expected a program")
            if self.running >= self.limits.requests:
                raise Refused(429, f"{self.running} requests are being answered; try again later")
            self.running += 1
            self.measures.running.inc()
            try:
                return await endpoint(request)
            finally:
                self.running -= 1
                self.measures.running.dec()

        async def counted(request: Request) -> Response:
            began = time.perf_counter()
            response = await refusing(request)
            self.measures.requests.labels(path, response.status_code).inc()
            self.measures.seconds.labels(path).observe(time.perf_counter() - began)
            return response

        refusing = self._refusing(limited)
        return counted

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Refuse what takes too long."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise Refused(429, f"no answer in {self.limits.seconds:g} seconds") from None

    async def _answered(self, read: Read, request: Request) -> Response:
        async with self._in_time():
            question = read(await self._json(request), self.engine.served)
            answered = await self._predict(request, question)
        self.measures.answers(answered.served.id, answered.rows)
        return JSONResponse(question.write(answered), headers={_ROUND: answered.served.id})

    async def _predict(self, request: Request, question: Question) -> Answered:
        """The engine's answer; if the client goes before it, its request leaves the queue."""
        answer = asyncio.wrap_future(self.engine.ask(question.table, whole=question.whole))
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()

    async def _json(self, request: Request) -> Any:
        """The JSON of a body that is not too large; None of an empty one."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.bytes:
                raise Refused(413, f"the body has more than {self.limits.bytes} bytes")
        try:
            return json.loads(body, parse_constant=_no_number) if body else None
        except (ValueError, RecursionError) as error:
            raise Refused(422, f"the body is not JSON: {str(error) or 'too deep'}") from None

    def _refusing(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with a response in place of what it raises."""

        async def refusing(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Refused as error:
                return _error(error.status, str(error))
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception:  # a bug, which is counted too
                _LOG.exception("a request failed")
                return _error(500, "the request failed; the server's log says why")

        return refusing

    async def _health(self, request: Request) -> Response:
        """Whether the process works; restart it if not."""
        if not self.engine.alive:
            raise Refused(503, "nothing is predicted any more")
        return Response()

    async def _ready(self, request: Request) -> Response:
        """Whether to send requests here."""
        if self.running >= self.limits.requests:
            raise Refused(503, "too much to do")
        return await self._health(request)

    async def _info(self, request: Request) -> Response:
        """What is served, and the limits, with the names of Text Embeddings Inference first."""
        served, limits = self.engine.served, self.limits
        posterior, before = served.posterior, self.engine.before
        count = posterior.model.likelihood.num_labels(posterior.model.network.outputs) or 0
        names = posterior.columns.label_names or [*map(str, range(count))]
        facts = {
            "model_id": posterior.facts.get("backbone", ""),
            "model_sha": served.id,
            "model_type": {
                "classifier": {
                    "id2label": {str(i): name for i, name in enumerate(names)},
                    "label2id": {name: i for i, name in enumerate(names)},
                }
            },
            "max_concurrent_requests": limits.requests,
            "max_input_length": served.limit,
            "max_batch_tokens": limits.tokens,
            "max_client_batch_size": limits.texts,
            "auto_truncate": True,
            "version": __version__,
            "name": self.name,
            "round": served.id,
            "round_before": None if before is None else before.id,
            "kind": served.kind,
            "columns": [*served.texts, *served.numbers],
            "method": served.way,
            "facts": posterior.facts,
            "promise": None if served.promised is None else str(served.promised),
        }
        return JSONResponse(facts, headers={_ROUND: served.id})

    async def _about_server(self, request: Request) -> Response:
        return JSONResponse({"name": "bhpeft_pyro", "version": __version__, "extensions": []})

    async def _about_model(self, request: Request) -> Response:
        return JSONResponse(protocols.about_model(self.name, self.engine.served))

    async def _take_labels(self, request: Request) -> Response:
        """Keep labels of texts, which are on the disk when this answers."""
        async with self._in_time():
            payload = await self._json(request)
        served = self.engine.served
        labels = feedback.read(payload, served)
        if labels.count > self.limits.texts:
            raise Refused(413, f"{labels.count} rows; expected {self.limits.texts} at most")
        # Without a limit of time: what is told to have failed would be sent again, and count twice.
        async with self._labelling:
            seen = await asyncio.to_thread(self.feedback.take, served, labels)
        return JSONResponse({"taken": labels.count, "round": served.id} | seen.tally.plain)

    async def _labels_so_far(self, request: Request) -> Response:
        """What the labels of the round say, and whether its promise holds."""
        served = self.engine.served
        seen = await asyncio.to_thread(self.feedback.seen, served)
        return JSONResponse({"round": served.id} | seen.tally.plain | {"promise": seen.promise})

    async def _metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        seen = await asyncio.to_thread(self.feedback.seen, self.engine.served)
        self.measures.feedback(seen)
        return Response(self.measures.text(), media_type="text/plain; version=0.0.4")

    async def _swap(self, request: Request) -> Response:
        """Load a round beside the one that is served, warm it up, and let it answer."""
        self._check_token(request)
        payload = {} if (given := await self._json(request)) is None else given
        name = payload.get("round") if isinstance(payload, dict) else payload
        if not isinstance(name, str | None) or not isinstance(payload, dict):
            raise Refused(422, f"round: got {shown(name)}; expected the id or folder of a round")
        if others := payload.keys() - {"round"}:
            names = ", ".join(map(repr, sorted(others)))
            raise Refused(422, f"got {names}; expected 'round' alone")
        async with self._exchange:
            try:
                served = await asyncio.to_thread(self.source.load, name, self.engine.served)
            # Too little memory is a RuntimeError of PyTorch's.
            except (BHPEFTError, OSError, MemoryError, RuntimeError) as error:
                raise Refused(422, str(error) or "too little memory") from error
            return self._exchanged(lambda: self.engine.exchange(served))

    async def _roll_back(self, request: Request) -> Response:
        """Let the round before answer again, which is still loaded."""
        self._check_token(request)
        async with self._exchange:
            return self._exchanged(self.engine.roll_back)

    def _exchanged(self, exchange: Callable[[], None]) -> Response:
        exchange()
        now, before = self.engine.served, self.engine.before
        told = {"round": now.id, "round_before": None if before is None else before.id}
        if now.no_promise and before is not None and before.promised is not None:
            told["warning"] = f"nothing is promised any more: {now.no_promise}"
            _LOG.warning(told["warning"])
        self.measures.exchanges.labels(now.id).inc()
        _LOG.info("round %s answers in place of %s", now.id, told["round_before"])
        return JSONResponse(told)

    def _check_token(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.token is None:
            raise Refused(401, "rounds are not exchanged here: the service has no admin token")
        # Headers come as Latin-1, whatever their bytes mean.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refused(401, "expected the header 'authorization: Bearer TOKEN'")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, why: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    body = {"error": why, "error_type": _TYPES.get(status, "Validation")}
    return JSONResponse(body, status, headers={"retry-after": "1"} if status == 429 else headers)


async def _no_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
