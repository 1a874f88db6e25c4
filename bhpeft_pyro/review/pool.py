"""The texts that people may label, as plain values: what a posterior says of each, and their order.

A pool needs neither the posterior nor a transformer, so that the page stays small and quick, and
another process can make the next one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.checks import shown
from ..base.log import check_columns
from ..base.progress import work
from ..data import Examples
from ..data.columns import as_choices
from ..data.copies import among, keys_of
from ..data.table import is_number, table
from ..errors import DataError, GuideError
from ..posterior import Posterior

_FIRST = 50  # texts whose labels teach most, together; after them the least certain come


@dataclass(frozen=True)
class Item:
    """A text, and what is predicted for it.

    Attributes:
        row: the first row of the data that has this text.
        texts: the text, and its pair if there is one; the question of multiple choice.
        options: the names of what can be chosen; none of ratings.
        values: for each of them the label as the data have it.
        probabilities: for each of them how probable it is.
        rating: the predicted mean, and the ends of the 90 % interval.
        uncertainty: "epistemic" and "aleatoric", in the forecast's unit, and "novelty" if known.
        reason: the main one to doubt the prediction, or None; see `Forecast.reasons`.
        queued: whether it is there because its label teaches most; in words, or "".
        nearest: the learnt text that is most like it, if the posterior keeps texts.
    """

    row: int
    texts: tuple[str, ...]
    options: tuple[str, ...]
    values: tuple[Any, ...]
    probabilities: tuple[float, ...]
    rating: tuple[float, float, float] | None
    uncertainty: Mapping[str, float]
    reason: str | None
    queued: str
    nearest: str | None

    def together(self, chosen: Collection[int]) -> list[Any]:
        """Several options, as a file has them."""
        return [self.values[number] for number in sorted({*chosen})]


NOTE = "note"
"""The column of the log for what people write beside their label."""


@dataclass(frozen=True)
class Pool:
    """All different texts of a table, and the order in which people are asked about them.

    Attributes:
        items: by the key of the text, by which copies are one (`data.copies.keys_of`).
        order: keys of the texts to label, most useful first: those that teach most, together
            (`Posterior.queue`), then the least certain ones. Learnt texts are not there, nor those
            that are answered under the posterior's promise.
        answered: how many texts are answered under the promise; None without one.
        records: of each row of the table what the posterior reads, as it is in the file.
        kind: of the labels: "class", "labels", "rating" or "choice".
        column: the name of the column for the label.
        scale: of ratings, the whole numbers that the learnt ones lie between, or the ends of their
            scale; None for other labels, and where that is not known.
        limited: whether no rating can be beyond the scale.
        round: id of the posterior's round.
        number: how many rounds there have been.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> file = Path(tempfile.mkdtemp()) / "new.csv"
    >>> _ = file.write_text("text\\nw5 w9\\nw30 w31\\nW5  w9\\n")
    >>> pool = Pool.of(posterior, file)
    >>> sorted(pool.items[key].row for key in pool.order)  # the last is a copy
    [0, 1]
    """

    items: Mapping[str, Item]
    order: tuple[str, ...]
    answered: int | None
    records: tuple[Mapping[str, Any], ...]
    kind: str
    column: str
    scale: tuple[float, float] | None
    limited: bool
    round: str
    number: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are kept with a label, which is the last of them."""
        return (*self.records[0], self.column)

    def label(self, item: Item, chosen: Sequence[int]) -> Any:
        """The label that a person gives who chooses these options."""
        return item.together(chosen) if self.kind == "labels" else item.values[chosen[0]]

    def rating(self, number: object) -> float:
        """The rating that a person gives, checked.

        Raises:
            DataError: it is no finite number, or beyond the scale.
        """
        low, high = self.scale if self.scale and self.limited else (None, None)
        if not is_number(number):
            raise DataError(f"rating={shown(number)}: expected a finite number, such as 3.5")
        rating = float(number)  # type: ignore[arg-type]
        if (low is not None and rating < low) or (high is not None and rating > high):
            raise DataError(f"rating={rating:g}: expected a number from {low} to {high}")
        return rating

    @staticmethod
    def of(posterior: Posterior, source: object) -> Pool:
        """That of the texts in what `bh.data.table` takes; labels in it are not looked at.

        Raises:
            DataError: the texts cannot be used.
        """
        kind, columns = posterior.model.likelihood.kind, posterior.columns
        numbers = {*columns.extra, *posterior.model.likelihood.columns}
        kept = [*columns.inputs(kind), *sorted(numbers)]
        check_columns((*kept, columns.target(kind)), [NOTE])
        rows = table(source, columns.inputs(kind))
        examples = posterior.model.encode_texts(rows, columns)
        given: list[dict[str, Any]] = rows[kept].to_dict("records")
        with work("choosing what to ask", parts=2) as whole:
            forecast: Any = posterior.predict(examples)
            whole.next()
            hashes, answered = examples.hashes, forecast.answered
            asked = ~among(hashes, posterior.learnt_rows)
            promised = torch.zeros_like(asked) if answered is None else asked & answered
            asked &= ~promised
            queued = _queued(posterior, examples, asked.nonzero().flatten())
            whole.next()
        choices = [as_choices(row[columns.choices]) for row in given] if kind == "choice" else []
        keys = keys_of(hashes, choices)
        said, predicted = forecast.table(), _predicted(forecast, kind)
        parts = [by for by in ("epistemic", "aleatoric", "novelty") if by in said]
        uncertainty = said[parts].to_dict("records")
        items: dict[str, Item] = {}
        for row, key in reversed([*enumerate(keys)]):  # of copies the first stays
            names, labels, probabilities, rating = predicted[row]
            if kind == "choice":
                names, named = choices[row]
                # In a CSV file a position would be read as the text that is this number.
                called = [n if names.count(n) == 1 else k for k, n in enumerate(names)]
                labels = called if named is None else named
            read = [name for name in columns.inputs(kind) if name != columns.choices]
            items[key] = Item(
                row,
                tuple(str(given[row][name]) for name in read),
                tuple(names),
                tuple(labels),
                tuple(probabilities[: len(names)]),
                rating,
                uncertainty[row],
                said["reason"][row],
                queued.get(row, ""),
                said["nearest"][row] or None if "nearest" in said else None,
            )
        rows = forecast.uncertainty("total").argsort(descending=True, stable=True).tolist()
        order = tuple(dict.fromkeys(keys[row] for row in (*queued, *rows) if asked[row]))
        settled = {keys[row] for row in promised.nonzero().flatten().tolist()} - {*order}
        return Pool(
            items,
            order,
            None if answered is None else len(settled),
            tuple(given),
            kind,
            columns.target(kind),
            *_scale(posterior, forecast),
            posterior.report.id,
            len(posterior.lineage),
        )


def _queued(posterior: Posterior, examples: Examples, places: Tensor) -> dict[int, str]:
    """Of the texts at some places those whose labels teach most, in order, with the reasons."""
    if not len(places):
        return {}
    try:
        queue = posterior.queue(examples.subset(places), min(_FIRST, len(places)))
    except GuideError:  # a single point estimate does not know what it does not know
        return {}
    return dict(zip(places[queue.rows].tolist(), queue.reasons, strict=True))


def _predicted(
    forecast: Any, kind: str
) -> list[tuple[list[str], list[Any], list[float], tuple[float, float, float] | None]]:
    """For each text the names of what can be chosen, the labels that they stand for, their
    probabilities; and the predicted rating with its interval."""
    if kind == "rating":
        ends = [values.tolist() for values in (forecast.mean, *forecast.interval(0.9))]
        return [([], [], [], rating) for rating in zip(*ends, strict=True)]
    probabilities = forecast.probabilities.tolist()
    values = [*forecast.label_names]
    return [([*map(str, values)], values, each, None) for each in probabilities]


def _scale(posterior: Posterior, forecast: Any) -> tuple[tuple[float, float] | None, bool]:
    """Between which numbers ratings lie, and whether they have to."""
    low, high = getattr(forecast, "scale", (None, None))
    if low is not None and high is not None:
        return (low, high), True
    likelihood: Any = posterior.model.likelihood
    center, spread = (getattr(likelihood, name, None) for name in ("center", "spread"))
    if posterior.model.likelihood.kind != "rating" or center is None or spread is None:
        return None, False
    # Outputs of -2 and 2 stand for the ends (`tasks.ratings`).
    return (math.floor(center - 2 * spread), math.ceil(center + 2 * spread)), False
