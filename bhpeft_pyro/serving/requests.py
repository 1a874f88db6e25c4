"""What requests must be like, before their JSON is looked at; and responses that refuse them."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..base.checks import shown
from .engine import Refused

_TYPES = {
    401: "Unauthorized",
    403: "Unauthorized",
    424: "Backend",
    429: "Overloaded",
    503: "Unhealthy",
}


async def json_of(request: Request, most: int) -> Any:
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
    try:
        return json.loads(body, parse_constant=_no_number, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        if other := _other_form(request):
            raise Refused(415, f"{other}; expected plain JSON") from None
        raise Refused(422, f"the body is not JSON: {str(error) or 'too deep'}") from None


def _other_form(request: Request) -> str | None:
    """What the headers say that a body which is no JSON is."""
    headers = request.headers
    coding, kind = headers.get("content-encoding"), headers.get("content-type", "")
    if coding is not None:
        return f"the body is compressed (content-encoding {shown(coding)})"
    if "inference-header-content-length" in headers:
        return "the body has binary tensors"
    # What curl and forms say by default, whatever they send.
    if kind and not any(one in kind for one in ("json", "form-urlencoded", "text/plain")):
        return f"the body is {shown(kind)}"
    return None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that is there twice, Python would keep the last."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{shown(name)} is there twice")
        made[name] = value
    return made


def check_host(request: Request, allowed: Collection[str]) -> None:
    """Refuse a name of somebody else's: a web page whose name leads to this machine, by DNS
    rebinding, may read what it answers. Such a name has a dot and is no address."""
    host = request.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = host
    if "." not in name or name in allowed:
        return
    try:
        ip_address(name)
    except ValueError:
        raise Refused(
            403,
            f"host: got {shown(host)}; expected an address, a name without a dot, or one that the "
            "service was told to allow (--allow-host)",
        ) from None


def check_token(request: Request, token: str | None) -> None:
    """Refuse who lacks the token. Spaces at its ends are no part of it: HTTP drops them."""
    expected = os.fsencode(token or "").strip()
    if not expected:
        raise Refused(401, "rounds are not exchanged here: the service has no admin token")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers come as Latin-1, whatever their bytes mean: stripped as text, they would lose some.
    right = hmac.compare_digest(given.encode("latin-1").strip(), expected)
    if scheme.lower() != "bearer" or not right:
        raise Refused(401, "expected the header 'authorization: Bearer TOKEN'")


async def disconnected(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(status: int, why: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What a client gets in place of an answer."""
    body = {"error": why, "error_type": _TYPES.get(status, "Validation")}
    return JSONResponse(body, status, headers={"retry-after": "1"} if status == 429 else headers)


async def no_path(request: Request, error: Exception) -> Response:
    """The refusal of a path that is not there, or has another method."""
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, error.detail, error.headers)
