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
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, TypeAdapter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..base.checks import shown
from ..errors import BHPEFTError
from . import feedback
from .counters import Metrics
from .engine import Answered, Engine, Limits
from .requests import (
    AnyRequest,
    Refused,
    SwapRequest,
    TableRequest,
    TensorRequest,
    TextRequest,
    check,
    model_metadata,
    openapi,
)
from .rounds import Served, Source, Table

__all__ = ["Service"]

Endpoint = Callable[[Request], Awaitable[Response]]

_LOG = logging.getLogger("uvicorn.error")  # which is shown at this level
_GONE = 499  # nobody reads it; nginx has the number for a client that closed its request
_ROUND = "x-bhpeft-round"
_TYPES = {
    401: "Unauthorized",
    403: "Unauthorized",
    424: "Backend",
    429: "Overloaded",
    503: "Unhealthy",
}


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
        self.metrics = Metrics()
        self.engine = Engine(served, limits, self.metrics.batch)
        self.feedback = feedback.Feedback(limits.tokens)
        self.running = 0
        self._exchange, self._labelling = asyncio.Lock(), asyncio.Lock()

    @property
    def application(self) -> Starlette:
        """The application, for any ASGI server."""
        model = f"/v2/models/{self.name}"
        version = f"{model}/versions/{{version}}"
        infer = partial(self._answer, TypeAdapter(TensorRequest))
        read: dict[str, Endpoint] = {
            "/health": self._health,
            "/ready": self._ready,
            "/info": self._info,
            "/metrics": self._read_metrics,
            "/openapi.json": self._openapi,
            "/ping": self._health,
            "/feedback": self._labels_so_far,
            "/v2": self._about_server,
            "/v2/health/live": self._health,
            "/v2/health/ready": self._ready,
            model: self._about_model,
            version: self._about_model,
            f"{model}/ready": self._ready,
            f"{version}/ready": self._ready,
        }
        limited: dict[str, tuple[str, Endpoint]] = {  # with the path that metrics name
            "/predict": ("/predict", partial(self._answer, TypeAdapter(TextRequest))),
            "/invocations": ("/invocations", partial(self._answer, TypeAdapter(TableRequest))),
            f"{model}/infer": (f"{model}/infer", infer),
            f"{version}/infer": (f"{model}/infer", infer),
            "/feedback": ("/feedback", self._take_labels),
        }
        admin: dict[str, Endpoint] = {"/admin/swap": self._swap, "/admin/rollback": self._roll_back}
        routes = [Route(path, self._refusing(endpoint)) for path, endpoint in read.items()]
        for path, endpoint in admin.items():
            routes.append(Route(path, self._refusing(endpoint), methods=["POST"]))
        for path, (named, limited_endpoint) in limited.items():
            routes.append(Route(path, self._counted(named, limited_endpoint), methods=["POST"]))
        return Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _no_path}
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.close)

    def _refusing(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with a response in place of what it raises."""

        async def refusing(request: Request) -> Response:
            try:
                self._check_host(request)
                return await endpoint(request)
            except Refused as error:
                return _refusal(error.status, str(error))
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception:  # a bug, which is counted too
                _LOG.exception("a request failed")
                return _refusal(500, "the request failed; the server's log says why")

        return refusing

    def _counted(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint of a path whose requests are limited, counted and timed."""
        refusing = self._refusing(partial(self._limited, endpoint))

        async def counted(request: Request) -> Response:
            began = time.perf_counter()
            response = await refusing(request)
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
            return response

        return counted

    async def _limited(self, endpoint: Endpoint, request: Request) -> Response:
        """The response of an endpoint, unless too many are being answered."""
        if "origin" in request.headers:  # or any page in a browser here could post labels
            raise Refused(403, "a web page sent this (header 'origin'); expected a program")
        if self.running >= self.limits.requests:
            raise Refused(429, f"{self.running} requests are being answered; try again later")
        self.running += 1
        try:
            with self.metrics.running.track_inprogress():
                return await endpoint(request)
        finally:
            self.running -= 1

    def _check_host(self, request: Request) -> None:
        """Refuse a name of somebody else's: a web page whose name leads to this machine, by DNS
        rebinding, may read what it answers. Such a name has a dot and is no address."""
        host = request.headers.get("host", "")
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            if "." not in name or name in self.hosts or ip_address(name):
                return
        raise Refused(
            403,
            f"host: got {shown(host)}; expected an address, a name without a dot, or one that the "
            "service was told to allow (--allow-host)",
        )

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Refuse what takes too long."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise Refused(429, f"no answer in {self.limits.seconds:g} seconds") from None

    async def _answer(self, kind: TypeAdapter[AnyRequest], request: Request) -> Response:
        """What a protocol answers."""
        async with self._in_time():
            asked = check(kind, await _json_of(request, self.limits.bytes))
            _check_version(request, self.engine.served)
            table = asked.frame(self.engine.served)
            rows, served = await self._predict(request, table, asked.truncate)
        _check_version(request, served)  # which may have come meanwhile
        self.metrics.answers(served.id, rows)
        answer = asked.write(rows, served, self.name)
        return JSONResponse(answer, headers={_ROUND: served.id})

    async def _predict(self, request: Request, table: Table, truncate: bool) -> Answered:
        """The engine's answer; if the client goes before it, its request leaves the queue."""
        answer = asyncio.wrap_future(self.engine.ask(table, truncate=truncate))
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

    async def _openapi(self, request: Request) -> Response:
        paths: dict[str, type[BaseModel]] = {
            "/predict": TextRequest,
            "/invocations": TableRequest,
            f"/v2/models/{self.name}/infer": TensorRequest,
            "/feedback": feedback.LabelsRequest,
            "/admin/swap": SwapRequest,
        }
        return JSONResponse(openapi(__version__, paths))

    async def _about_server(self, request: Request) -> Response:
        return JSONResponse({"name": "bhpeft_pyro", "version": __version__, "extensions": []})

    async def _about_model(self, request: Request) -> Response:
        served = self.engine.served
        _check_version(request, served)
        return JSONResponse(model_metadata(self.name, served))

    async def _take_labels(self, request: Request) -> Response:
        """Keep labels of texts, which are on the disk when this answers."""
        async with self._in_time():
            payload = await _json_of(request, self.limits.bytes)
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

    async def _read_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        seen = feedback.Seen(feedback.Tally(), None, None)
        with suppress(Refused):  # the file of labels cannot be read, and the log says so
            seen = await asyncio.to_thread(self.feedback.seen, self.engine.served)
        self.metrics.feedback(seen)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _swap(self, request: Request) -> Response:
        """Load a round beside the one that is served, warm it up, and let it answer."""
        _check_token(request, self.token)
        payload = await _json_of(request, self.limits.bytes)
        name = check(_SWAP, {} if payload is None else payload).round
        async with self._exchange:
            try:
                served = await asyncio.to_thread(self.source.load, name, self.engine.served)
            # Too little memory is a RuntimeError of PyTorch's.
            except (BHPEFTError, OSError, MemoryError, RuntimeError) as error:
                raise Refused(422, str(error) or "too little memory") from error
            return self._exchanged(lambda: self.engine.exchange(served))

    async def _roll_back(self, request: Request) -> Response:
        """Let the round before answer again, which is still loaded."""
        _check_token(request, self.token)
        async with self._exchange:
            return self._exchanged(self.engine.roll_back)

    def _exchanged(self, exchange: Callable[[], None]) -> Response:
        exchange()
        now, before = self.engine.served, self.engine.before
        answer = {"round": now.id, "round_before": None if before is None else before.id}
        if now.no_promise and before is not None and before.promised is not None:
            answer["warning"] = f"nothing is promised any more: {now.no_promise}"
            _LOG.warning(answer["warning"])
        self.metrics.exchanges.labels(now.id).inc()
        _LOG.info("round %s answers in place of %s", now.id, answer["round_before"])
        return JSONResponse(answer)


_SWAP: TypeAdapter[SwapRequest] = TypeAdapter(SwapRequest)


async def _json_of(request: Request, most: int) -> Any:
    """The JSON of a body of `most` bytes; None of an empty one."""
    body, why = bytearray(), f"the body has more than {most} bytes"
    if int(request.headers.get("content-length", 0)) > most:
        raise Refused(413, why)
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(413, why)
    if not body:
        return None
    if "inference-header-content-length" in request.headers:
        raise Refused(415, "the body has binary tensors; expected plain JSON")
    try:
        payload = json.loads(body, parse_constant=_no_number, object_pairs_hook=_each_once)
        if b"\\u" in body:  # half of a pair of surrogates could not be sent back
            json.dumps(payload, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"the body is not JSON: {str(error) or 'too deep'}") from None
    return payload


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that is there twice, Python would keep the last."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name is there twice")
    return entries


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_token(request: Request, token: str | None) -> None:
    """Refuse who lacks the token. Spaces at its ends are no part of it: HTTP drops them."""
    expected = os.fsencode(token or "").strip()
    if not expected:
        raise Refused(401, "rounds are not exchanged here: the service has no admin token")
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    # Headers come as Latin-1, whatever their bytes mean: stripped as text, they would lose some.
    right = hmac.compare_digest(sent.encode("latin-1").strip(), expected)
    if scheme.lower() != "bearer" or not right:
        raise Refused(401, "expected the header 'authorization: Bearer TOKEN'")


def _check_version(request: Request, served: Served) -> None:
    """Refuse a version of the model that is not this round, if the path names one."""
    version = request.path_params.get("version", served.id)
    if version != served.id:
        raise Refused(404, f"version: {shown(version)} does not answer; expected {served.id!r}")


def _refusal(status: int, why: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What a client gets in place of an answer."""
    body = {"error": why, "error_type": _TYPES.get(status, "Validation")}
    return JSONResponse(body, status, headers={"retry-after": "1"} if status == 429 else headers)


async def _no_path(request: Request, error: Exception) -> Response:
    """The refusal of a path that is not there, or has another method."""
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, error.detail, error.headers)
