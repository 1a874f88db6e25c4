"""Pools of texts to label, without a posterior, and what shows them to people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bhpeft_pyro.review import Item, Learning, Pool, Session, Where, application

NAMES = ("billing", "delivery", "praise")


def pool(count: int = 5, kind: str = "class", **changes: Any) -> Pool:
    """Texts with the keys t0, t1, ..., in this order."""
    scale = (1.0, 5.0) if kind == "rating" else None
    rating = (3.21, 2.0, 4.5) if kind == "rating" else None
    names = () if kind == "rating" else NAMES
    uncertainty = {"epistemic": 0.25, "aleatoric": 0.5}
    about = {}
    for i in range(count):
        said = (0.2, 0.5, 0.3)[: len(names)], rating, uncertainty, "little learnt from such texts"
        queued = "praise (30%)" if i == 0 else ""
        about[f"t{i}"] = Item(i, (f"text {i}",), names, names, *said, queued, None)
    records = tuple({"text": f"text {i}"} for i in range(count))
    facts = {
        "items": about,
        "order": tuple(about),
        "answered": None,
        "records": records,
        "kind": kind,
        "column": "label",
        "scale": scale,
        "limited": scale is not None,
        "round": "r1",
        "number": 1,
    }
    return Pool(**facts | changes)


def changed(of: Pool, key: str, **how: Any) -> Pool:
    """The pool with one of its texts changed."""
    return replace(of, items={**of.items, key: replace(of.items[key], **how)})


def session_in(folder: Path, texts: Pool | None = None, **how: Any) -> Session:
    """One that keeps what is decided in a folder."""
    return Session(texts or pool(), folder / "labels.db", **how)


def page_in(folder: Path, *texts: Pool, **how: Any) -> tuple[Session, Learning, Any]:
    """The session, the updates and the application of a page, whose secret is "secret"."""
    session = session_in(folder, *texts, **how)
    where = Where(folder / "run", folder / "next", "new.csv", session.log.path)
    learning = Learning(where, session.take)
    return session, learning, application(session, learning, "secret", "week-1")
