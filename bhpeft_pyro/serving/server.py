"""The service: its paths, what it refuses, and the exchange of rounds.

Prediction has a thread of its own (`engine`), so that the event loop always answers `/health` and
refuses at once what is too much. An error has the status that clients of Text Embeddings Inference
expect, and the body `{"error": ..., "error_type": ...}`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
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
from .requests import check_host, check_token, disconnected, json_of, no_path, refusal

__all__ = ["Service"]

Read = Callable[[Any, Served], Question]
Endpoint = Callable[[Request], Awaitable[Response]]

_LOG = logging.getLogger("uvicorn.error")  # which is shown at this level
_GONE = 499  # nobody reads it; nginx has the number for a client that closed its request
_ROUND = "x-bhpeft-round"


class Service:
    """What the paths of an application share.

    Args:
        source: where rounds come from.
        served: the round that answers first.
        limits: what is taken on.
        token: with which rounds are exchanged; None if nobody may.
        hosts: names of this machine that clients may use, besides addresses and names without a
            dot.

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
        self,
        source: Source,
        served: Served,
        limits: Limits,
        token: str | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.source, self.limits, self.token = source, limits, token
        self.hosts = {host.strip().lower() for host in hosts}
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
        version = f"{model}/versions/{{version}}"
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
        }
        for one in (model, version):
            read |= {one: self._about_model, f"{one}/ready": self._ready}
        posted: dict[str, Endpoint] = {
            "/admin/swap": self._refusing(self._swap),
            "/admin/rollback": self._refusing(self._roll_back),
            "/feedback": self._limited("/feedback", self._take_labels),
        }
        for path, reader in asked.items():
            posted[path] = self._limited(path, partial(self._answered, reader))
        posted[f"{version}/infer"] = posted[f"{model}/infer"]
        routes = [Route(path, self._refusing(endpoint)) for path, endpoint in read.items()]
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posted.items()]
        return Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: no_path}
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
            payload = await json_of(request, self.limits.bytes)
            _check_version(request, self.engine.served)
            question = read(payload, self.engine.served)
            answered = await self._predict(request, question)
        _check_version(request, answered.served)  # which may have come meanwhile
        self.measures.answers(answered.served.id, answered.rows)
        return JSONResponse(question.write(answered), headers={_ROUND: answered.served.id})

    async def _predict(self, request: Request, question: Question) -> Answered:
        """The engine's answer; if the client goes before it, its request leaves the queue."""
        answer = asyncio.wrap_future(self.engine.ask(question.table, whole=question.whole))
        gone = asyncio.ensure_future(disconnected(request))
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()

    def _refusing(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with a response in place of what it raises."""

        async def refusing(request: Request) -> Response:
            try:
                check_host(request, self.hosts)
                return await endpoint(request)
            except Refused as error:
                return refusal(error.status, str(error))
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception:  # a bug, which is counted too
                _LOG.exception("a request failed")
                return refusal(500, "the request failed; the server's log says why")

        return refusing

    async def _health(self, request: Request) -> Response:
        """Whether the process works; restart it if not."""
        if not self.engine.alive:
            raise Refused(503, "nothing is predicted any more")
        return Response()

    async def _ready(self, request: Request) -> Response:
        """Whether to send requests here."""
        _check_version(request, self.engine.served)
        if self.running >= self.limits.requests:
            raise Refused(503, "too much to do")
        return await self._health(request)

    async def _info(self, request: Request) -> Response:
        """What is served, and the limits, with the names of Text Embeddings Inference first."""
        served, limits = self.engine.served, self.limits
        posterior, before = served.posterior, self.engine.before
        names = posterior.columns.label_names or ()
        backbone = posterior.facts["backbone"]
        if Path(backbone).is_absolute():
            backbone = Path(backbone).name  # where it is on this machine is nobody's business
        facts = {
            "model_id": backbone,
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
            "facts": posterior.facts | {"backbone": backbone},
            "promise": None if served.promised is None else str(served.promised),
        }
        return JSONResponse(facts, headers={_ROUND: served.id})

    async def _about_server(self, request: Request) -> Response:
        return JSONResponse({"name": "bhpeft_pyro", "version": __version__, "extensions": []})

    async def _about_model(self, request: Request) -> Response:
        served = self.engine.served
        _check_version(request, served)
        return JSONResponse(protocols.about_model(self.name, served))

    async def _take_labels(self, request: Request) -> Response:
        """Keep labels of texts, which are on the disk when this answers."""
        async with self._in_time():
            payload = await json_of(request, self.limits.bytes)
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
        seen = feedback.Seen(feedback.Tally(), None, None)
        with suppress(Refused):  # the file of labels cannot be read, and the log says so
            seen = await asyncio.to_thread(self.feedback.seen, self.engine.served)
        self.measures.feedback(seen)
        return Response(self.measures.text(), media_type="text/plain; version=0.0.4")

    async def _swap(self, request: Request) -> Response:
        """Load a round beside the one that is served, warm it up, and let it answer."""
        check_token(request, self.token)
        payload = {} if (given := await json_of(request, self.limits.bytes)) is None else given
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
        check_token(request, self.token)
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


def _check_version(request: Request, served: Served) -> None:
    """Refuse a version of the model that is not this round, if the path names one."""
    version = request.path_params.get("version", served.id)
    if version != served.id:
        raise Refused(404, f"version: {shown(version)} does not answer; expected {served.id!r}")
