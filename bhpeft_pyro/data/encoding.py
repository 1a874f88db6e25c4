"""`encode`: from any source of text to `Examples`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.checks import shown, warn
from ..base.isolation import locked
from ..base.values import valid
from ..errors import BHPEFTWarning, ConfigError, DataError
from .columns import (
    Columns,
    Kind,
    as_choices,
    check_text,
    check_unicode,
    read_cells,
    wrong,
)
from .copies import hashes_of, plain
from .examples import Examples
from .labels import (
    completed,
    names_in,
    read_answers,
    read_classes,
    read_labels,
    read_ratings,
    unlabelled,
)
from .table import need, numbered, table
from .tokens import joins_pairs, tokenise


class CutWarning(BHPEFTWarning):
    """Texts were too long and have been cut.

    Attributes:
        cut: how many.
        limit: the number of tokens that are left.
    """

    def __init__(self, cut: int, texts: int, limit: int | None) -> None:
        super().__init__(f"{cut} of {texts} texts are longer than {limit} tokens and were cut")
        self.cut, self.limit = cut, limit


@contextmanager
def cut_once() -> Iterator[None]:
    """Let only the first `CutWarning` through, where data are read again and again."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def once(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, CutWarning):
                warnings.filterwarnings("ignore", category=CutWarning)
            show(message, category, *where)

        warnings.showwarning = once  # type: ignore[assignment]
        yield


def encode(
    source: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind,
    columns: Columns = Columns(),
    classes: int | None = None,
    labelled: bool = True,
    ordered: bool = False,
) -> Examples:
    """Read, check and tokenise a data set.

    Args:
        source: what `table` takes; or `Examples`, which are checked and returned as they are.
        tokenizer: the backbone's.
        kind: "class", "labels", "rating" or "choice".
        columns: how the source is read. Where it has no `label_names`, the source names the
            classes.
        classes: how many classes there are, if the source may not have all of them: they are then
            called "0", "1" and so on.
        labelled: whether labels are required. If not, they are used if every row has one.
        ordered: whether the order of the classes matters: names that a table has then need it.

    Raises:
        DataError: anything that would make the data unusable, with column and row, numbered as by
            `table`.

    Warns:
        CutWarning: once, with the number of texts that were cut.

    >>> from bhpeft_pyro.testing import tiny_tokenizer
    >>> rows = [{"question": "w5", "choices": ["w6", "w7"], "answer": 1},
    ...         {"question": "w8", "choices": ["w6", "w7 w9", "w5"], "answer": 2}]
    >>> batch = next(encode(rows, tiny_tokenizer(), kind="choice").batches(2))
    >>> batch.choices.tolist(), batch.labels.tolist()
    ([[True, True, False], [True, True, True]], [1, 2])
    """
    _check_arguments(tokenizer, kind, columns)
    names = columns.label_names
    if isinstance(source, Examples):
        _check_compatible(source, tokenizer, kind, columns, labelled)
        if names is None and source.label_names is not None:
            names = completed(source.label_names, classes, columns.label)
        return source if names is None else source.among(names)

    inputs, target = columns.inputs(kind), columns.target(kind)
    rows, limit = table(source, inputs), token_limit(tokenizer, columns, kind)
    with numbered(need(rows, *inputs, *columns.extra, *((target,) if labelled else ()))):
        values = _label_cells(rows, target, kind, names, labelled)
        if names is None and values is not None and kind in ("class", "labels"):
            called = _names(source, rows, values, target, kind, ordered)
            names = completed(called, classes, target)
        extra = {name: read_ratings(rows[name].tolist(), name, "number") for name in columns.extra}
        texts = read_cells(rows[inputs[0]].tolist(), inputs[0], check_text)
        choices = second = None
        if kind == "choice":
            choices = read_cells(rows[columns.choices].tolist(), columns.choices, as_choices)
        elif columns.pair is not None:
            second = read_cells(rows[columns.pair].tolist(), columns.pair, check_text)
        labels = None if values is None else _labels(values, target, kind, names, choices)
        counts = None if choices is None else torch.tensor([len(each) for each, _ in choices])
        sequences, hashes = _sequences(texts, second, choices)
        tokens, cut = tokenise(tokenizer, sequences, limit)
        owner = torch.arange(len(texts)).repeat_interleave(1 if counts is None else counts)
        if int(tokens.lengths.min()) == 0:
            empty = owner[tokens.lengths == 0].unique().tolist()
            problem = f"the tokenizer finds no token in {shown(texts[empty[0]])}"
            raise wrong(inputs[0], empty, problem)
    if cut:
        warn(CutWarning(len(owner[cut].unique()), len(texts), limit))
    return Examples(
        kind=kind,
        tokens=tokens,
        labels=labels,
        texts=tuple(texts),
        label_names=None if names is None else tuple(names),
        counts=counts,
        probe=probe_of(tokenizer),
        hashes=hashes,
        extra=extra,
    )


def _label_cells(
    rows: pd.DataFrame, column: str, kind: Kind, names: Sequence[str] | None, labelled: bool
) -> list[Any] | None:
    """The cells of the labels; None if there are none, or if they are not required and one is
    missing."""
    if column not in rows:
        return None
    values: list[Any] = rows[column].tolist()
    placeholder = kind in ("class", "choice") and "-1" not in (names or ())
    if not labelled and unlabelled(values, column, placeholder):
        return None
    read_cells(values, column, check_unicode)
    return values


def _names(
    source: object,
    rows: pd.DataFrame,
    values: Sequence[Any],
    column: str,
    kind: Kind,
    ordered: bool,
) -> Sequence[str]:
    """The names of the classes in a column of these values, in the source's order if it has
    one."""
    names = _ordered_names(source, rows, column, unused=ordered)
    names = names or names_in(values, column, kind, ordered)
    # -1, for rows without a label, is refused where the labels are read.
    return [name for name in names if name != "-1"] if -1 in values else names


def _labels(
    values: Sequence[Any],
    column: str,
    kind: Kind,
    names: Sequence[str] | None,
    choices: Sequence[tuple[list[str], list[Any] | None]] | None,
) -> Tensor:
    if choices is not None:
        return read_answers(values, column, choices)
    if names is None:
        return read_ratings(values, column)
    return (read_labels if kind == "labels" else read_classes)(values, column, names)


def _sequences(
    texts: Sequence[str],
    second: Sequence[str] | None,
    choices: Sequence[tuple[list[str], list[Any] | None]] | None,
) -> tuple[list[tuple[str, ...]], Tensor]:
    """What is tokenised, a sequence for each example or choice, and a hash of each example."""
    if choices is None:
        columns = [texts] if second is None else [texts, second]
        rows: list[tuple[str, ...]] = [*zip(*columns, strict=True)]
        return rows, hashes_of(rows)
    asked = [(q, options) for q, (options, _) in zip(texts, choices, strict=True)]
    # Each choice is read on its own, so their order makes no difference.
    hashes = hashes_of((q, *sorted(map(plain, options))) for q, options in asked)
    return [(q, option) for q, options in asked for option in options], hashes


def _ordered_names(
    source: object, rows: pd.DataFrame, column: str, unused: bool
) -> Sequence[str] | None:
    """The classes of a column in their order, if the source has one: that of a `ClassLabel`, or of
    an ordered categorical of texts, of which the `unused` ones too, or not."""
    kind = source.dtypes.get(column) if isinstance(source, pd.DataFrame) else None
    if not (isinstance(kind, pd.CategoricalDtype) and kind.ordered):
        names: Sequence[str] | None = rows.attrs.get("classes", {}).get(column)
        return names
    assert isinstance(source, pd.DataFrame)
    found = source[column] if unused else source[column].cat.remove_unused_categories()
    called = found.cat.categories.tolist()
    return called if all(isinstance(name, str) for name in called) else None


def _check_arguments(tokenizer: object, kind: Kind, columns: Columns) -> None:
    """Whether they are what `encode` takes, and go together."""
    if len(tokenizer) <= len({*tokenizer.all_special_ids}):  # type: ignore[arg-type,attr-defined]
        raise ConfigError(
            "tokenizer: it knows no words, like that of a folder without a tokenizer's files; "
            "expected tokenizer.save_pretrained(folder) beside the model; in Python, tokenizer=..."
        )
    valid(Kind, "kind", kind)
    if kind not in ("class", "labels") and columns.label_names is not None:
        raise DataError(f"label_names are for kind='class' and 'labels', not for kind={kind!r}")
    if kind == "choice" and columns.pair is not None:
        raise DataError(f"columns.pair={columns.pair!r} is not for {kind=}")


def _check_compatible(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    columns: Columns,
    labelled: bool,
) -> None:
    """Refuse examples that were encoded in another way than is asked for."""
    if examples.kind != kind:
        raise DataError(f"source holds examples of kind={examples.kind!r}; expected {kind!r}")
    if examples.probe != probe_of(tokenizer):
        raise DataError("source was encoded with another tokenizer; encode the texts again")
    if labelled and examples.labels is None:
        raise DataError("source holds examples without labels; labelled=True needs them")
    longest, limit = int(examples.lengths.max()), columns.max_length
    if limit is not None and longest > limit:
        raise DataError(f"source has texts of {longest} tokens; max_length={limit}")
    if missing := [name for name in columns.extra if name not in examples.extra]:
        raise DataError(f"source was encoded without the column {missing[0]!r}; encode it again")


def token_limit(tokenizer: PreTrainedTokenizerBase, columns: Columns, kind: Kind) -> int | None:
    """The most tokens a sequence may have; None if neither user nor tokenizer set a limit."""
    if columns.max_length is None:
        limit = tokenizer.model_max_length
        return limit if limit < 10**6 else None  # "no limit" is a very large number there
    pair = len(columns.inputs(kind)) == 2 and not joins_pairs(tokenizer)
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if columns.max_length < least:
        raise DataError(f"max_length={columns.max_length}: expected at least {least}")
    return columns.max_length


@locked()
def probe_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Vocabulary size and ids of a fixed text: tokenizers that agree on them pass for the same."""
    text = "The 2nd quick-brown fox didn't jump; 'na\u00efve' caf\u00e9s, $1,984.50!"
    ids = tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
    return (len(tokenizer), *ids)
