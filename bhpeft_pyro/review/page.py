"""The page: forms that work without a script, and a small script for keys.

It is for this machine: the addresses hold a secret, the host has to be this one's name, and texts
are escaped. The policy allows no script, style or picture from elsewhere, and none in the page.
"""

from __future__ import annotations

import math
import secrets
import string
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..base.checks import harmless, optional_library
from ..errors import BHPEFTError, BusyError, DataError, SaveError
from .learning import Learning
from .pool import Item
from .session import Decision, Session

_HOSTS = ("127.0.0.1", "localhost")
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",  # the address holds the secret
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_LONGEST = 40  # characters of a person's name
_NOTE = 2000  # characters of a note
_OWN_KEYS = "sune?"  # skip, undo, none, note, help
KEYS = [key for key in string.digits[1:] + string.ascii_lowercase if key not in _OWN_KEYS]
"""Keys of the options, in order; those after them have none."""

REASONS = {
    "people may differ": "People may differ about texts like this one.",
    "models disagree": "Independent fits say different things about it.",
    "little learnt from such texts": "Little was learnt from texts like this one.",
    "unlike what was learnt": "It is unlike the texts that were learnt.",
}


def application(session: Session, learning: Learning, token: str = "", title: str = "") -> Any:
    """The page as an ASGI application.

    Args:
        session: the texts, and what was decided.
        learning: updates in the background.
        token: the secret in the addresses; by default a new one, as `app.state.token`.
        title: the name of the run.
    """
    for library in ("starlette", "jinja2", "python_multipart"):  # the last one reads forms
        optional_library(library, "serve")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    token = token or secrets.token_urlsafe(16)
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(here / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["percent"] = lambda share: f"{share:.0%}".replace("%", " %")
    templates.filters |= {"shown": _shown, "digits": _digits}
    fixed: set[str] = set()  # who wants each label in the same place

    def rendered(name: str, status: int = 200, **what: Any) -> Any:
        what |= {"root": f"/{token}", "title": title, "pool": session.pool}
        return HTMLResponse(templates.get_template(name).render(what), status)

    def home_of(who: str) -> str:
        return f"/{token}/by/{quote(who, safe='')}/"

    def go(where: str) -> Any:
        return RedirectResponse(where, 303)

    def names(request: Any, problem: str = "", status: int = 200) -> Any:
        return rendered("names.html", status, people=session.names, problem=problem)

    def text_page(who: str, key: str | None, problem: str = "", status: int = 200) -> Any:
        """The page of a text, or of none that is left."""
        item = None if key is None else session.item(key)
        decisions = session.snapshot().by_text.get(key or "", {})
        mine = decisions.get(who)
        return rendered(
            "text.html",
            status,
            who=who,
            me=home_of(who),
            key=key,
            item=item,
            options=_options(item, who in fixed, mine) if item else [],
            steps=_steps(session.pool.scale),
            mine=mine,
            others=[one for name, one in decisions.items() if name != who and one.action != "skip"],
            reason=REASONS.get(item.reason, item.reason) if item and item.reason else "",
            progress=session.progress(who),
            agreement=session.agreement(),
            recent=session.recent(who),
            fixed=who in fixed,
            learning=learning.state,
            problem=problem,
        )

    def text(request: Any) -> Any:
        who = _name(request.path_params["who"])
        key = request.path_params.get("key") or session.next_for(who)
        return text_page(who, key)

    async def decide(request: Any) -> Any:
        async with request.form(max_files=0, max_fields=1000) as form:
            chosen = [str(value) for value in form.getlist("label")]
            note = str(form.get("note", "")).replace("\r\n", "\n")[:_NOTE]  # as browsers send it
            action = str(form.get("action", "label"))
            if action == "other":  # a rating by slider or number
                action, chosen = "label", [str(form.get("other", ""))]
        who, key = _name(request.path_params["who"]), request.path_params["key"]

        def keep() -> Any:
            try:
                session.decide(who, key, action, chosen, harmless(note))
            except DataError as error:
                return text_page(who, key, str(error), 422)
            return go(home_of(who))

        return await run_in_threadpool(keep)

    async def named(request: Any) -> Any:
        async with request.form(max_files=0) as form:
            given = str(form.get("who", ""))
        return go(home_of(_name(given)))

    def undo(request: Any) -> Any:
        who = _name(request.path_params["who"])
        key = session.undo(who)
        return go(home_of(who) + (f"text/{key}" if key else ""))

    def order(request: Any) -> Any:
        who = _name(request.path_params["who"])
        fixed.symmetric_difference_update({who})
        return go(home_of(who))

    def update(request: Any) -> Any:
        who = _name(request.path_params["who"])
        with suppress(BusyError):  # somebody else was quicker, and the page shows that one
            if session.labels:
                learning.start()
        return go(home_of(who))

    def state(request: Any) -> Any:
        return JSONResponse(vars(learning.state))

    def failed(request: Any, error: Any) -> Any:
        if not isinstance(error, SaveError):
            return names(request, str(error), 422)
        who = _name(request.path_params["who"])  # only what somebody decides is saved
        key = request.path_params.get("key") or session.next_for(who)
        return text_page(who, key, str(error), 503)

    routes = [
        Route("/", names),
        Route("/", named, methods=["POST"]),
        Mount("/static", StaticFiles(directory=here / "static")),
        Route("/by/{who}/", text),
        Route("/by/{who}/text/{key}", text),
        Route("/by/{who}/text/{key}", decide, methods=["POST"]),
        Route("/by/{who}/undo", undo, methods=["POST"]),
        Route("/by/{who}/order", order, methods=["POST"]),
        Route("/by/{who}/update", update, methods=["POST"]),
        Route("/by/{who}/state", state),
    ]
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=_guarded),
            Middleware(TrustedHostMiddleware, allowed_hosts=[*_HOSTS]),
        ],
        exception_handlers={BHPEFTError: failed},
    )
    app.state.token = token
    return app


async def _guarded(request: Any, following: Callable[[Any], Awaitable[Any]]) -> Any:
    """Headers for every answer."""
    answer = await following(request)
    answer.headers.update(_HEADERS)
    return answer


def _name(who: str) -> str:
    """A person's name, as it is kept."""
    who = " ".join(who.split())
    if not who.strip(".") or len(who) > _LONGEST or harmless(who) != who or "/" in who:
        raise DataError(f"who: expected a name of 1 to {_LONGEST} characters, without a slash")
    return who


def _options(item: Item, fixed: bool, mine: Decision | None) -> list[dict[str, Any]]:
    """What can be chosen, by probability or in its own place, each with its key."""
    label = mine.label if mine else None
    chosen = label if isinstance(label, list) else [label]
    order = [*range(len(item.options))]
    if not fixed:
        order.sort(key=lambda number: -item.probabilities[number])
    keys = [*KEYS, *[""] * len(order)]
    return [
        {
            "number": number,
            "key": keys[place],
            "name": item.options[number],
            "chosen": item.values[number] in chosen,
            "share": item.probabilities[number],
        }
        for place, number in enumerate(order)
    ]


def _steps(scale: tuple[float, float] | None) -> list[int]:
    """The whole ratings of a short scale, which get buttons of their own."""
    if scale is None or scale[1] - scale[0] > 10:
        return []
    return [*range(math.ceil(scale[0]), math.floor(scale[1]) + 1)]


def _digits(ends: tuple[float, float]) -> int:
    """How many digits behind the dot a slider has, so that it has 20 to 200 steps."""
    return -math.floor(math.log10(max(ends[1] - ends[0], 1e-6) / 20))


def _shown(label: Any) -> str:
    """A label in a list of decisions."""
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "no label"
    return f"{label:g}" if isinstance(label, float) else str(label)
