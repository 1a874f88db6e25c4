"""`encode`: from any source of text to `Examples`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .columns import DEFAULT_COLUMNS, Columns, Kind, check_texts, read_choices
from .examples import Examples
from .labels import read_answers, read_classes, read_ratings, unlabelled
from .sources import read
from .tokens import join_pairs, limit_of, probe, tokenise

__all__ = ["CutWarning", "cut_once", "encode"]


class CutWarning(UserWarning):
    """Texts were too long and have been cut."""


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
    columns: Columns = DEFAULT_COLUMNS,
    num_labels: int | None = None,
    labelled: bool = True,
    new_names: bool = True,
) -> Examples:
    """Read, check and tokenise a data set.

    Args:
        source: a data set of the Hugging Face hub, by name: "owner/name", with a split
            "owner/name:test" (default train; slices as in "owner/name:train[:1000]" work), with
            a configuration "owner/name[config]:split"; or a `datasets.Dataset`; a path to a
            .csv, .json or .jsonl file; a mapping of lists; a list of dicts; with
            `labelled=False` also a list of texts or of (question, choices) pairs; or
            `Examples`, which are returned as they are if they fit.
        tokenizer: the backbone's.
        kind: "class", "rating" or "choice".
        columns: how the source is read.
        num_labels: number of classes, where they have no names; by default the largest plus 1.
        labelled: whether labels must be there. If not, they are used where no row lacks its own.
        new_names: whether the source may name the classes where `columns.label_names` does not.
            False where the classes are known by their numbers: other labels are then refused.

    Raises:
        DataError: anything that would make the data unusable, with column and row (from 0).

    Warns:
        CutWarning: once, with the number of texts that were cut.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "yes": 1, "no": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    >>> rows = [{"question": "no ?", "choices": ["yes", "no"], "answer": 1},
    ...         {"question": "yes ?", "choices": ["no", "no no", "yes"], "answer": 2}]
    >>> batch = next(encode(rows, tokenizer, kind="choice").batches(2))
    >>> batch.choices.tolist(), batch.labels.tolist()
    ([[True, True, False], [True, True, True]], [1, 2])
    """
    if kind not in get_args(Kind):
        raise DataError(f"kind={kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}")
    names, max_length = columns.label_names, columns.max_length
    if kind != "class" and (names is not None or num_labels is not None):
        raise DataError(f"label_names and num_labels are for kind='class', not for kind={kind!r}")
    if kind == "choice" and columns.pair is not None:
        raise DataError(f"columns.pair={columns.pair!r} is not for kind='choice'")
    if num_labels is not None and (type(num_labels) is not int or num_labels < 2):
        raise DataError(f"num_labels={num_labels!r}; expected an integer of at least 2")
    if names is not None and num_labels not in (None, len(names)):
        raise DataError(f"num_labels={num_labels}, but there are {len(names)} label_names")
    pair = len(columns.inputs(kind)) == 2
    limit = limit_of(tokenizer, max_length, pair and not join_pairs(tokenizer))
    if isinstance(source, Examples):
        _check_compatible(source, tokenizer, kind, columns, num_labels, labelled)
        if names is None and source.label_names is not None and not new_names:
            raise DataError(
                f"source has the classes {source.label_names}; expected classes without names"
            )
        return source

    table = read(source, kind, columns, labelled)
    target = columns.target(kind)
    values: list[Any] | None = table[target][:] if target in table.column_names else None
    if values is not None and not labelled and unlabelled(values):
        values = None

    labels: Tensor | None = None
    counts: Tensor | None = None
    second: list[str] | None = None
    texts = check_texts(table[columns.inputs(kind)[0]][:], columns.inputs(kind)[0])
    first = texts
    if kind == "choice":
        choices, marks = read_choices(table[columns.choices][:], columns.choices)
        counts = torch.tensor([len(options) for options in choices])
        first = [q for q, options in zip(texts, choices, strict=True) for _ in options]
        second = list(chain.from_iterable(choices))
        if values is not None:
            labels = read_answers(values, target, choices, marks)
    else:
        if columns.pair is not None:
            second = check_texts(table[columns.pair][:], columns.pair)
        if kind == "rating" and values is not None:
            labels = read_ratings(values, target)
        elif values is not None:
            feature = table.features[target]
            guessed = names is None and num_labels is None
            labels, names, num_labels = read_classes(
                values, target, feature, names, num_labels, new_names
            )
            if labelled and guessed and len(labels.unique()) == 1:
                raise DataError(
                    f"column {target!r}: all {len(labels)} labels are {values[0]!r}; "
                    "expected at least two classes"
                )

    tokens, cut = tokenise(tokenizer, first, second, limit)
    owner = torch.arange(len(texts))
    if counts is not None:
        owner = owner.repeat_interleave(counts)
    if int(tokens.lengths.min()) == 0:
        row = int(owner[tokens.lengths == 0][0])
        raise DataError(f"row {row}: the tokenizer finds no token in {texts[row]!r:.60}")
    cut = torch.zeros(len(texts), dtype=torch.bool).index_put_((owner[cut],), torch.tensor(True))
    if bool(cut.any()):
        warnings.warn(
            f"{int(cut.sum())} of {len(texts)} texts are longer than {limit} tokens and were cut",
            CutWarning,
            stacklevel=2,
        )
    return Examples(
        kind=kind,
        tokens=tokens,
        labels=labels,
        texts=tuple(texts),
        label_names=None if names is None else tuple(names),
        num_labels=num_labels if names is None else len(names),
        counts=counts,
        cut=cut,
        probe=probe(tokenizer),
    )


def _check_compatible(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    columns: Columns,
    num_labels: int | None,
    labelled: bool,
) -> None:
    """Whether examples that are encoded already are what was asked for."""
    if examples.kind != kind:
        raise DataError(f"source holds examples of kind={examples.kind!r}; expected {kind!r}")
    if examples.probe != probe(tokenizer):
        raise DataError("source was encoded with another tokenizer; encode the texts again")
    if labelled and examples.labels is None:
        raise DataError("source holds examples without labels; labelled=True needs them")
    longest, limit = int(examples.lengths.max()), columns.max_length
    if limit is not None and longest > limit:
        raise DataError(f"source has texts of {longest} tokens; max_length={limit}")
    own, names = examples.label_names, columns.label_names
    if names is not None and own is not None and names != own:
        raise DataError(f"source has the classes {own}; expected {names}")
    count = len(names) if names is not None else num_labels
    if count is not None and (examples.num_labels or 0) > count:
        raise DataError(f"source has {examples.num_labels} classes; expected {count}")
