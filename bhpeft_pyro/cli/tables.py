"""The tables that commands read: labelled rows for a new model or a saved one, and their parts."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.checks import few
from ..data import Columns, Examples
from ..data.copies import warn_of_copies
from ..data.labels import are_positions
from ..data.table import need, table
from ..errors import DataError
from ..model.backbone import load_backbone
from ..model.model import Model
from ..posterior import Posterior
from .options import Reading
from .screen import say
from .task import infer


class LabelledTable:
    """What `fit`, `compare` and `stream` begin with: the rows of --data, and their task.

    Attributes:
        rows: all columns.
        task: what is to be predicted from which columns.
    """

    def __init__(self, data: str, reading: Reading) -> None:
        self.reading = reading
        self.rows = table(data, reading.texts, reading.encoding)
        self.task = infer(self.rows, reading)
        say(f"{len(self.rows)} rows, {self.task}")

    def backbone(self, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The transformer that --backbone names, and its tokenizer."""
        say(f"loading {self.reading.backbone}")
        return load_backbone(self.reading.backbone, device)

    def encode(self, model: Model) -> Examples:
        """All rows, before some are held out."""
        examples = model.encode(self.rows, self.task.columns)
        say_labels(examples, self.task.levels)
        return examples

    def split(
        self,
        model: Model,
        examples: Examples,
        given: float | str | None,
        seed: int,
        option: str = "--validation",
    ) -> tuple[Examples, Examples | None]:
        """`split`, with files that are read as this table."""

        def read(file: str) -> Examples:
            rows = table(file, self.reading.texts, self.reading.encoding)
            _say_positions(rows, self.task.columns)
            return model.encode(rows, self.task.columns)

        return split(examples, given, seed, read, option)


def rows_for(posterior: Posterior, source: str, encoding: str | None) -> pd.DataFrame:
    """A table for a posterior, which has the columns of texts that it was fitted to."""
    inputs = posterior.columns.inputs(posterior.model.likelihood.kind)
    return need(table(source, inputs, encoding), *inputs)


def labelled_for(posterior: Posterior, source: str, encoding: str | None) -> pd.DataFrame:
    """The same with the column of the labels."""
    columns = posterior.columns
    target = columns.target(posterior.model.likelihood.kind)
    rows = need(rows_for(posterior, source, encoding), target)
    _say_positions(rows, columns)
    return rows


def _say_positions(rows: pd.DataFrame, columns: Columns) -> None:
    """Say so where labels are the positions of the classes that have names."""
    label, names = columns.label, columns.label_names
    if names and label in rows and len(rows) and are_positions(rows[label], names):
        say(f"labels are numbers: 0 stands for {names[0]!r}, 1 for {names[1]!r} and so on")


def say_labels(examples: Examples, levels: int = 0) -> None:
    """How many examples each class has, or where ratings lie; of few whole numbers, what they may
    be instead."""
    if counts := _tally(examples):
        say(counts)
    if levels and examples.labels is not None:
        low, high = examples.labels.min(), examples.labels.max()
        say(
            f"note: there are {levels} different ratings: intervals end at {low:g} and {high:g}. "
            "For the probability of each, use --task classes"
        )


def _tally(examples: Examples) -> str:
    """How many examples each class has; of ratings where they lie."""
    labels = examples.labels
    if labels is None or examples.kind == "choice":
        return ""
    if examples.kind == "rating":
        numbers = labels.double()
        sd = numbers.std(correction=0)
        ends = f"{numbers.min():g} to {numbers.max():g}"
        return f"ratings from {ends}, mean {numbers.mean():.3g}, sd {sd:.3g}"
    if examples.kind == "labels":
        counts = labels.sum(0).long()
    else:
        counts = labels.bincount(minlength=len(examples.label_names or ()))
    named = zip(examples.label_names or (), counts.tolist(), strict=True)
    return few([f"{name} {count}" for name, count in named])


def split(
    examples: Examples,
    given: float | str | None,
    seed: int,
    read: Callable[[str], Examples],
    option: str = "--validation",
) -> tuple[Examples, Examples | None]:
    """Examples to learn from, and those held out: a share, or a file that `read` encodes; None
    holds out as `fit` does."""
    if isinstance(given, str):
        try:
            return examples, read(given)
        except DataError as error:
            raise DataError(f"{option} {'' if error.file else f'{given}: '}{error}") from error
    train, held_out = examples.hold_out(seed, given)
    if held_out is not None:
        warn_of_copies(examples)
    elif given is None:
        different = "different " if examples.copies else ""
        say(f"too few {different}rows to hold some out; {option} 20% does, and shows their metrics")
    elif given:
        rows, copies = len(examples), examples.copies
        where = f", and {copies} repeat another's text" if copies else ""
        raise DataError(
            f"{option}: {given:.3g} of {rows} rows is {round(given * rows)}{where}; expected "
            "another share, or 0 for none"
        )
    return train, held_out
