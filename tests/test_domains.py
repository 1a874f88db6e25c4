"""Two rounds of rated sentences: no text is in two parts, and none is neutral."""

from __future__ import annotations

from typing import Any

import pytest

from bhpeft_pyro.data.domains import two_rounds
from bhpeft_pyro.errors import DataError


def sentences(first: int, count: int = 120) -> list[dict[str, Any]]:
    """Texts of which the first word, w`first` or the next one, tells whether they are positive."""
    return [
        {
            "text": f"w{first + i % 2} w{15 + i // 35} w{15 + i % 35}",
            "rating": 2.0 if i % 2 else -2.0,
        }
        for i in range(count)
    ]


def test_no_text_is_in_two_parts_and_none_is_neutral() -> None:
    rows = sentences(5)
    repeats = [{**row, "text": row["text"].upper() + " "} for row in rows]
    neutral = [{"text": f"w40 w{15 + i}", "rating": 0.5} for i in range(20)]
    tweets = [
        {"text": f"w1 &amp; w{15 + i} w{16 + i}", "rating": 1.0 - i % 2 * 3} for i in range(34)
    ]
    domains = {"movies": rows + repeats + neutral, "tweets": rows[:20] + tweets}
    first, second = two_rounds(domains, (60, 10), 10, 12, seed=1)
    parts = [part for each in (first, second) for part in (each.train, each.validation, each.test)]
    assert [len(part) for part in parts] == [60, 10, 12, 10, 10, 12]
    texts = [text.casefold().strip() for part in parts for text in part["text"]]
    assert len(texts) == len(set(texts))
    assert not any(text.startswith("w40") for text in texts)
    for part in parts[:3]:  # the first word still tells the label: rows were not mixed up
        assert all((row["text"].casefold()[:2] == "w6") == row["label"] for row in part)


def test_rows_depend_on_the_seed_alone() -> None:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    one, same, other = (two_rounds(domains, (40, 10), 10, 20, seed)[0] for seed in (0, 0, 1))
    assert one.train["text"] == same.train["text"] != other.train["text"]


def test_too_few_sentences_are_refused() -> None:
    domains = {"movies": sentences(5, 20), "tweets": sentences(8, 20)}
    with pytest.raises(DataError, match="movies: 20 usable sentences, needed 30"):
        two_rounds(domains, (10, 4), 10, 10, seed=0)
