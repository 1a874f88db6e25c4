"""Sentences whose words have a label each: every word is an example of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.checks import shown
from ..base.threads import give_way, sampling
from ..errors import DataError
from .columns import as_list, check_text, each_row, wrong
from .tokens import CHUNK, Tokens


def read_words(values: Sequence[Any], column: str) -> list[list[str]]:
    """The words of each sentence: a list of them, in a CSV file as JSON, or a str that is split at
    white space."""

    def read(i: int, value: Any) -> list[str]:
        words = _split(value) if isinstance(value, str) else value
        if not isinstance(words, list):
            raise wrong(column, i, f"{shown(words)}; expected a list of words, or a text")
        if not words:
            raise wrong(column, i, "there is no word; drop the row or fill it in")
        return [check_text(word, column, i, f"word {k}: ") for k, word in enumerate(words)]

    return each_row(values, read)


def _split(text: str) -> list[str]:
    if text.startswith("["):
        with suppress(ValueError, RecursionError):
            words = json.loads(text)
            if all(isinstance(word, str) for word in words):
                return [*words]
    return text.split()


def labelled_words(
    cells: Sequence[Any] | None, column: str, sentences: Sequence[Sequence[str]], needed: bool
) -> tuple[list[Any] | None, list[int]]:
    """The labels of those words that have one, neither None nor -100, and these words' numbers. A
    cell is a list for a sentence, in a CSV file as JSON.

    Without labels, or if some word has none and they are not `needed`, None and all words.
    """

    def read(i: int, row: tuple[Any, Sequence[str]]) -> list[Any]:
        cell, words = row
        own = as_list(cell, column, i)
        if not isinstance(own, list):
            raise wrong(column, i, f"{shown(own)}; expected a list with a label for each word")
        if len(own) != len(words):
            raise wrong(column, i, f"{len(own)} labels for {len(words)} words")
        return [None if label == -100 else label for label in own]

    labels = [*chain.from_iterable(each_row(zip(cells or (), sentences, strict=False), read))]
    kept = [i for i, label in enumerate(labels) if label is not None]
    every = [*range(sum(map(len, sentences)))]
    if cells is None or (len(kept) < len(every) and not needed):
        return None, every
    if not kept:
        raise DataError(f"column {column!r}: no word has a label")
    return [labels[i] for i in kept], kept


@contextmanager
def naming_words(sentences: Sequence[Sequence[str]], kept: Sequence[int]) -> Iterator[None]:
    """Name sentence and word where reading the labels of the words `kept` fails at one of them."""
    try:
        yield
    except DataError as error:
        if not error.rows:
            raise
        places = [(i, k) for i, words in enumerate(sentences) for k in range(len(words))]
        found = [places[kept[row]] for row in error.rows]
        rows = [*dict.fromkeys(sentence for sentence, _ in found)]
        raise DataError.of_rows(
            error.where, rows, f"word {found[0][1]}: {error.problem}"
        ) from error


def tokenise_words(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    limit: int | None,
    column: str,
) -> tuple[Tokens, Tensor]:
    """Token sequences, and where each of the N words is in them.

    Words are joined by spaces, and a word's tokens are found by their character offsets. So the
    transformer reads running text; byte-level tokenizers would leave out the spaces if words were
    given one by one. A word for which the tokenizer has no token is replaced by its token for
    unknown words.

    A sentence of more than `limit` tokens becomes several sequences that overlap by half. Each word
    is read in the sequence that has all of its tokens and the most context on both sides.

    Returns:
        The sequences; and (N, 4) int64, for each word the number of its sequence, where its tokens
        begin and end there, and the number of its sentence.

    Raises:
        DataError: the tokenizer gives no offsets, or no token for a word.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer: {type(tokenizer).__name__} does not say which tokens a word has; expected "
            "a fast one"
        )
    tokens, words = _windows(tokenizer, sentences, limit)
    lost = (words[:, 2] == 0).split([*map(len, sentences)])
    if not any(bad.any() for bad in lost):
        return tokens, words
    unknown, mended = tokenizer.unk_token, [[*sentence] for sentence in sentences]

    def mend(i: int, bad: Tensor) -> None:
        for k in bad.nonzero().flatten().tolist():
            if unknown in (None, mended[i][k]):
                what = shown(mended[i][k])
                raise wrong(column, i, f"word {k}: the tokenizer finds no token in {what}")
            mended[i][k] = unknown

    each_row(lost, mend)
    return tokenise_words(tokenizer, mended, limit, column)


@sampling()
def _windows(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], limit: int | None
) -> tuple[Tokens, Tensor]:
    """As `tokenise_words`; a word without tokens ends at 0."""
    sizes = np.array([*map(len, sentences)])
    firsts = sizes.cumsum() - sizes
    places = np.zeros((sizes.sum(), 4), dtype=np.int64)
    places[:, 3] = np.arange(len(sizes)).repeat(sizes)
    best = np.zeros(len(places))
    room = 0 if limit is None else limit - tokenizer.num_special_tokens_to_add()
    parts: list[Tokens] = []
    sequence = count()
    for start in range(0, len(sentences), CHUNK):
        give_way()
        encoded = tokenizer(
            [" ".join(words) for words in sentences[start : start + CHUNK]],
            padding=False,
            truncation=limit is not None,
            max_length=limit,
            stride=room // 2,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        parts.append(Tokens.of(tokenizer, encoded["input_ids"], encoded.get("token_type_ids")))
        for i, offsets, special in zip(
            encoded["overflow_to_sample_mapping"],
            encoded["offset_mapping"],
            encoded["special_tokens_mask"],
            strict=True,
        ):
            row = start + i
            # A word begins with the space before it, which is the first token's or its own token.
            begins = np.cumsum([0, *(len(word) + 1 for word in sentences[row][:-1])])
            begins[1:] -= 1
            own = np.flatnonzero(np.array(special) == 0)
            last = np.array(offsets)[own, 1] - 1  # the last character of each token
            owner = begins.searchsorted(last.clip(0), side="right") - 1
            found, first, tokens = np.unique(owner, return_index=True, return_counts=True)
            at, until = own[first], own[first + tokens - 1] + 1
            # First how much of the word is there, then how much context on the shorter side.
            score = tokens + np.minimum(first, len(own) - first - tokens) / (len(own) + 1)
            number, here = firsts[row] + found, np.full(len(found), next(sequence))
            more = score > best[number]
            best[number[more]] = score[more]
            places[number[more], :3] = np.stack([here, at, until], 1)[more]
    return Tokens.joined(parts), torch.from_numpy(places)
