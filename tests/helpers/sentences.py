"""Rated sentences in the words of the tiny tokenizer, in place of the demonstration's."""

from __future__ import annotations

from typing import Any


def sentences(first: int, count: int = 120) -> list[dict[str, Any]]:
    """Texts of which the first word, w`first` or the next one, tells whether they are positive."""
    return [
        {
            "text": f"w{first + i % 2} w{15 + i // 35} w{15 + i % 35}",
            "rating": 2.0 if i % 2 else -2.0,
        }
        for i in range(count)
    ]
