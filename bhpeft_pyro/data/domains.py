"""The demonstration's data: two rounds of labelled sentences, the second from another domain."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from ..errors import DataError

__all__ = ["LABELS", "Round", "two_rounds"]

LABELS = ("negative", "positive")

# Mean ratings run from -4 to 4. Those nearer to 0 than this have no clear class and are left out.
_NEUTRAL = 0.5


@dataclass(frozen=True)
class Round:
    """Labelled sentences of one domain; no text is in two of the three parts.

    Attributes:
        name: the domain.
        train: what is learnt.
        validation: for early stopping and temperature scaling of the deterministic rival only.
        test: what everything is measured on.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset

    def __str__(self) -> str:
        share = sum(self.train["label"]) / len(self.train)
        return (
            f"{self.name}: {len(self.train)} training, {len(self.validation)} validation and "
            f"{len(self.test)} test sentences, {share:.0%} of the first positive"
        )


def two_rounds(
    domains: Mapping[str, Iterable[Mapping[str, Any]]],
    sizes: tuple[int, int],
    validation: int,
    test: int,
    seed: int,
) -> tuple[Round, Round]:
    """Film reviews first, then tweets: shorter, noisier, and with more positive ones.

    Args:
        domains: "movies" and "tweets", each rows with `text` and `rating` (`assets.sentiment()`).
        sizes: training rows of the two rounds.
        validation, test: rows of each round.
        seed: of the choice of rows.

    >>> rows = [{"text": f"film {i}", "rating": i % 3 - 1.0} for i in range(30)]
    >>> both = {"movies": rows, "tweets": [{**row, "text": row["text"] + "!"} for row in rows]}
    >>> first, second = two_rounds(both, (8, 4), 4, 6, seed=0)
    >>> print(second)
    tweets: 4 training, 4 validation and 6 test sentences, ...% of the first positive
    """
    seen: set[str] = set()
    first, second = (
        _round(name, domains[name], seen, (size, validation, test), seed)
        for name, size in zip(("movies", "tweets"), sizes, strict=True)
    )
    return first, second


def _round(
    name: str,
    source: Iterable[Mapping[str, Any]],
    seen: set[str],
    sizes: tuple[int, int, int],
    seed: int,
) -> Round:
    texts, labels = [], []
    for row in source:
        text = html.unescape(row["text"])
        key = " ".join(text.casefold().split())
        # A sentence that comes twice could be trained on and tested on.
        if abs(row["rating"]) > _NEUTRAL and key not in seen:
            seen.add(key)
            texts.append(text)
            labels.append(int(row["rating"] > 0))
    if len(texts) < sum(sizes):
        raise DataError(f"{name}: {len(texts)} usable sentences, needed {sum(sizes)}")
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    rows = Dataset.from_dict({"text": texts, "label": labels}, features=features).shuffle(seed)
    parts, start = [], 0
    for size in sizes:
        parts.append(rows.select(range(start, start + size)))
        start += size
    return Round(name, *parts)
