"""Toy rows for `testing.tiny_backbone`: words that give the label away, most of the time.

For checks that a command works; their results mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["ROWS"]

_COUNT, _NOISE = 600, 0.15


def _classes() -> list[dict[str, Any]]:
    draw, rows = Random(0), []
    for i in range(_COUNT):
        label = i % 3
        shown = draw.randrange(3) if draw.random() < _NOISE else label
        rows.append({"text": _text(draw, 5 + shown), "label": label, "label_name": "abc"[label]})
    return rows


def _ratings() -> list[dict[str, Any]]:
    draw, rows = Random(1), []
    for _ in range(_COUNT):
        rating = draw.uniform(-4, 4)
        sd = 0.5 + abs(rating) / 4
        text = _text(draw, 5 + round(rating) + 4)
        rows.append({"text": text, "rating": rating + draw.gauss(0, sd)})
    return rows


def _choices() -> list[dict[str, Any]]:
    draw, rows = Random(2), []
    for _ in range(_COUNT):
        answer, count = draw.randrange(2), draw.choice((2, 3))
        choices = [_text(draw, 6 if i == answer else 5, 2) for i in range(count)]
        rows.append({"question": _text(draw, 7), "choices": choices, "answer": answer})
    return rows


def _text(draw: Random, first: int, length: int = 4) -> str:
    return " ".join(f"w{word}" for word in (first, *draw.choices(range(15, 50), k=length)))


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "tiny-classes": _classes,
    "tiny-ratings": _ratings,
    "tiny-choices": _choices,
}
