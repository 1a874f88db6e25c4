"""Pools of texts to label, without a posterior."""

from __future__ import annotations

from typing import Any

from bhpeft_pyro.review import Item, Pool

NAMES = ("billing", "delivery", "praise")


def pool(count: int = 5, kind: str = "class", **changes: Any) -> Pool:
    """Texts with the keys t0, t1, ..., in this order."""
    scale = (1.0, 5.0) if kind == "rating" else None
    rating = (3.21, 2.0, 4.5) if kind == "rating" else None
    names = () if kind == "rating" else NAMES
    uncertainty = {"epistemic": 0.25, "aleatoric": 0.5}
    about = {}
    for i in range(count):
        said = (0.2, 0.5, 0.3)[: len(names)], rating, uncertainty, "weights uncertain"
        queued = "praise (30%)" if i == 0 else ""
        about[f"t{i}"] = Item(i, (f"text {i}",), names, names, *said, queued, None)
    records = tuple({"id": f"0{i}", "text": f"text {i}"} for i in range(count))
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
