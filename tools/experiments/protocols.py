"""In which order data come: the experiments with streams.

No file here is SST-2. What is used in its place are sentences of the Stanford Sentiment Treebank
with 0 to 4 stars, without those of 2 stars, cut into two classes. Sentences rated from -4 to 4
(VADER's ground truth, four domains) are cut at 0, without those nearer to it than 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset

from bhpeft_pyro.data.copies import plain
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.streams import by_period

from .tasks import once, read

__all__ = ["PROTOCOLS", "Protocol", "Stream"]

DOMAINS = ("tweets", "amazon", "movies", "nyt")
QUESTIONS = {"OpenBookQA": "commonsense-openbookqa-train", "ARC": "commonsense-arc-easy-train"}
_ORDERS = list(permutations(DOMAINS))
_STEP = 7  # in the list of orders, from seed to seed, so that all domains soon come first
_FIRST = 10  # rows of the first of `rounds`; each has twice as many as the one before
_UNLABELLED = 400  # texts besides, at most: ten are too few to tell along which axes texts differ


@dataclass(frozen=True)
class Stream:
    """Data in their order, with columns text and label (a whole number, or a rating); or question,
    choices and answer.

    Attributes:
        kind: of the labels.
        classes: how many there are; 1 of ratings and choices.
        batches: what is learnt, by name.
        tests: one for each batch, scored after every round; or none.
        final: scored after the last round; or none.
        unlabelled: texts that may be read before the first round; or none.
    """

    kind: Literal["class", "rating", "choice"]
    classes: int
    batches: Mapping[str, Dataset]
    tests: Mapping[str, Dataset]
    final: Dataset | None = None
    unlabelled: Dataset | None = None


@dataclass(frozen=True)
class Protocol:
    """A stream of data, another one for every seed.

    Attributes:
        read: from the data's folder, a seed, `rows` and `test` to the stream.
        rows: of the last round; of each domain; of a week, at most.
        test: rows of each test; 0 where batches are only predicted before they are learnt.
    """

    read: Callable[[Path | None, int, int, int], Stream]
    rows: int
    test: int


def _rounds(folder: Path | None, seed: int, rows: int, test: int) -> Stream:
    train, dev = (
        _two_classes(folder, f"sentiment-sst-{part}", "stars", middle=2.0, margin=0.5)
        for part in ("train", "dev")
    )
    sizes = [_FIRST]
    while sizes[-1] * 2 <= rows:
        sizes.append(sizes[-1] * 2)
    (final,) = _parts(dev, [test], seed)
    # The treebank has its development sentences in both files.
    tested = {*map(plain, final["text"][:])}
    texts = map(plain, train["text"][:])
    train = train.select([i for i, text in enumerate(texts) if text not in tested])
    spare = min(_UNLABELLED, max(0, len(train) - sum(sizes)))
    *parts, others = _parts(train, [*sizes, spare], seed)
    names = (str(size) for size in sizes)
    unlabelled = others.remove_columns("label") if spare else None
    return Stream("class", 2, dict(zip(names, parts, strict=True)), {}, final, unlabelled)


def _domains(
    folder: Path | None,
    seed: int,
    rows: int,
    test: int,
    rated: bool = False,
    orders: Sequence[tuple[str, ...]] = _ORDERS,
) -> Stream:
    """The domains in one of the orders, another for each seed; with their ratings, or two
    classes."""
    batches, tests = {}, {}
    for domain in orders[_STEP * seed % len(orders)]:
        if rated:
            table = read(folder, f"sentiment-{domain}").rename_column("rating", "label")
            table = table.select_columns(["text", "label"])
        else:
            table = _two_classes(folder, f"sentiment-{domain}", "rating", middle=0.0, margin=0.5)
        batches[domain], tests[domain] = _parts(table, [rows, test], seed)
    return Stream("rating" if rated else "class", 1 if rated else 2, batches, tests)


def _questions(folder: Path | None, seed: int, rows: int, test: int) -> Stream:
    """The sources of questions, in another order for odd seeds."""
    batches, tests = {}, {}
    for name in sorted(QUESTIONS, reverse=seed % 2 == 0):
        batches[name], tests[name] = _parts(read(folder, QUESTIONS[name]), [rows, test], seed)
    return Stream("choice", 1, batches, tests)


def _weekly(folder: Path | None, seed: int, rows: int, test: int) -> Stream:
    table = read(folder, "news-reuters-1987")
    topics = sorted(set(table["label_name"][:]))
    labels = [topics.index(name) for name in table["label_name"][:]]
    table = Dataset.from_dict({"date": table["date"][:], "text": table["text"][:], "label": labels})
    generator = torch.Generator().manual_seed(seed)
    batches = {}
    for week, batch in by_period(table, "date", "week").items():
        chosen = torch.randperm(len(batch), generator=generator)[:rows]
        batches[week] = batch.iloc[chosen.sort().values.tolist()]
    return Stream("class", len(topics), batches, {})


PROTOCOLS = {
    "rounds": Protocol(_rounds, rows=640, test=200),
    "orders": Protocol(_domains, rows=100, test=100),
    "orders-ratings": Protocol(partial(_domains, rated=True), rows=100, test=100),
    "tweets-first": Protocol(partial(_domains, orders=[DOMAINS]), rows=100, test=100),
    "nyt-first": Protocol(partial(_domains, orders=[DOMAINS[::-1]]), rows=100, test=100),
    "questions": Protocol(_questions, rows=200, test=200),
    "weekly": Protocol(_weekly, rows=100, test=0),
}


def _two_classes(
    folder: Path | None, file: str, column: str, middle: float, margin: float
) -> Dataset:
    """Each text once, without those whose rating is near the middle."""
    table = read(folder, file)
    rated = dict(zip(table["text"][:], table[column][:], strict=True))
    kept = {text: value for text, value in rated.items() if abs(value - middle) >= margin}
    labels = [int(value > middle) for value in kept.values()]
    return Dataset.from_dict({"text": list(kept), "label": labels})


def _parts(table: Dataset, sizes: Sequence[int], seed: int) -> list[Dataset]:
    """Random rows for each part, no text or question in two."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    asked = "question" if "question" in table.column_names else "text"
    table = once(table.select(order.tolist()), asked)
    if len(table) < sum(sizes):
        raise DataError(f"{sum(sizes)} rows are needed, there are {len(table)}")
    parts = torch.arange(sum(sizes)).split(list(sizes))
    return [table.select(part.tolist()) for part in parts]
