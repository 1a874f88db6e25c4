"""Token sequences of any length, end to end in one tensor, and how texts and words become them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.checks import shown
from ..base.isolation import locked
from ..base.progress import tracked
from ..errors import DataError
from .columns import CellError, read_cells

CHUNK = 10_000  # sequences looked at together, or given to the tokenizer: bounds memory


@dataclass(frozen=True, eq=False)
class Tokens:
    """R token sequences of any length, end to end in one tensor.

    Attributes:
        ids: (total,) int32, the sequences one after the other.
        types: (total,) token type ids, where the tokenizer gives them.
        lengths: (R,) number of tokens of each sequence, at least 1.
        pad: the id to pad with.
        pad_type: the token type to pad with.
    """

    ids: Tensor
    types: Tensor | None
    lengths: Tensor
    pad: int
    pad_type: int = 0

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]] | None,
    ) -> Tokens:
        """Sequences as a tokenizer gives them; padding, which is masked, may have any id."""
        # GPT-2 and Llama pad with their end-of-text token.
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(
            ids=_flat(ids),
            types=None if types is None else _flat(types),
            lengths=torch.tensor([len(row) for row in ids]),
            pad=next(int(pad) for pad in pads if pad is not None),
            pad_type=int(tokenizer.pad_token_type_id),
        )

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """The sequences of all parts, which pad alike."""
        return replace(
            parts[0],
            ids=torch.cat([part.ids for part in parts]),
            types=cat([part.types for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
        )

    @cached_property
    def starts(self) -> Tensor:
        """(R,) where in `ids` each sequence begins."""
        return self.lengths.cumsum(0) - self.lengths

    def take(self, rows: Tensor) -> Tokens:
        """The sequences `rows` (K,), in that order."""
        ids, types = [], []
        for some in rows.split(CHUNK):  # the places are of int64: those of all take much memory
            lengths = self.lengths[some]
            shift = self.starts[some] - (lengths.cumsum(0) - lengths)
            at = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
            ids.append(self.ids[at])
            types.append(None if self.types is None else self.types[at])
        return replace(self, ids=torch.cat(ids), types=cat(types), lengths=self.lengths[rows])

    def places(self, rows: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Where in `ids` the tokens of the sequences `rows` (...) are, padded on the right, and
        which of them are no padding: (..., T) both. Where `present` (...) is False all are."""
        lengths = self.lengths[rows]
        if present is not None:
            lengths = lengths * present
        offsets = torch.arange(int(lengths.max()))
        real = offsets < lengths.unsqueeze(-1)
        return (self.starts[rows].unsqueeze(-1) + offsets).masked_fill(~real, 0), real

    def padded(self, rows: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """The transformer's inputs for the sequences `rows` (...), padded on the right: (..., T).

        Where `present` (...) is False the row is a dummy of padding with its first token visible,
        as attention over no token at all would be NaN.
        """
        at, real = self.places(rows, present)
        mask = real.long()
        if present is not None:
            mask[..., 0] = 1
        inputs = {
            "input_ids": self.ids[at].long().masked_fill(~real, self.pad),
            "attention_mask": mask,
        }
        if self.types is not None:
            inputs["token_type_ids"] = self.types[at].long().masked_fill(~real, self.pad_type)
        return inputs


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([*chain.from_iterable(rows)], dtype=torch.int32)


def cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts that are there, joined; None if none is."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def joins_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two texts become one, as for decoders, which have no separator token."""
    return tokenizer.sep_token_id is None


@locked()  # truncation is a state of fast tokenizers
def tokenise(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, ...]], limit: int | None
) -> tuple[Tokens, list[int]]:
    """Tokens of R texts, or pairs of texts, and which of them had to be cut to `limit`.

    Two texts with a separator between them are cut longest first. Joined texts lose their
    beginning: cutting the end could leave nothing of the second text, and make all choices equal.
    """
    cutter = tokenizer
    if len(rows[0]) == 2 and joins_pairs(tokenizer):
        rows = [(" ".join(row),) for row in rows]
        if limit is not None and tokenizer.truncation_side != "left":
            cutter = copy.deepcopy(tokenizer)  # the caller's stays as it is
            cutter.truncation_side = "left"
    how: dict[str, Any] = {"padding": False, "return_attention_mask": False, "verbose": False}
    parts: list[Tokens] = []
    cut: list[int] = []
    starts = range(0, len(rows), CHUNK)
    for start in tracked(starts, "reading texts", len(starts)):
        chunk = rows[start : start + CHUNK]
        encoded = tokenizer(*map(list, zip(*chunk, strict=True)), **how)
        over = [i for i, row in enumerate(encoded["input_ids"]) if limit and len(row) > limit]
        if over:
            columns = map(list, zip(*(chunk[i] for i in over), strict=True))
            shorter = cutter(*columns, truncation=True, max_length=limit, **how)
            for name, values in shorter.items():
                for i, row in zip(over, values, strict=True):
                    encoded[name][i] = row
        cut += [start + i for i in over]
        parts.append(Tokens.of(tokenizer, encoded["input_ids"], encoded.get("token_type_ids")))
    return Tokens.joined(parts), cut


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
    is read in the sequence that has most of its tokens, then the most context on both sides.

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
    unknown = tokenizer.unk_token

    def mend(row: tuple[Sequence[str], Tensor]) -> list[str]:
        words = [*row[0]]
        for k in row[1].nonzero().flatten().tolist():
            if unknown in (None, words[k]):
                raise CellError(f"word {k}: the tokenizer finds no token in {shown(words[k])}")
            words[k] = unknown
        return words

    mended = read_cells(zip(sentences, lost, strict=True), column, mend)
    return tokenise_words(tokenizer, mended, limit, column)


@locked()
def _windows(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], limit: int | None
) -> tuple[Tokens, Tensor]:
    """Sequences and words for `tokenise_words`; a word without tokens ends at 0."""
    sizes = np.array([*map(len, sentences)])
    firsts = sizes.cumsum() - sizes
    places = np.zeros((sizes.sum(), 4), dtype=np.int64)
    places[:, 3] = np.arange(len(sizes)).repeat(sizes)
    best = np.zeros(len(places))
    room = 0 if limit is None else limit - tokenizer.num_special_tokens_to_add()
    parts: list[Tokens] = []
    sequence = count()
    for start in range(0, len(sentences), CHUNK):
        encoded = tokenizer(
            [" ".join(sentence) for sentence in sentences[start : start + CHUNK]],
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
            real = np.flatnonzero(np.array(special) == 0)
            last = np.array(offsets)[real, 1] - 1  # the last character of each token
            owner = begins.searchsorted(last.clip(0), side="right") - 1
            words, first, tokens = np.unique(owner, return_index=True, return_counts=True)
            at, until = real[first], real[first + tokens - 1] + 1
            # First how much of the word is there, then how much context on the shorter side.
            score = tokens + np.minimum(first, len(real) - first - tokens) / (len(real) + 1)
            number, here = firsts[row] + words, np.full(len(words), next(sequence))
            better = score > best[number]
            best[number[better]] = score[better]
            places[number[better], :3] = np.stack([here, at, until], 1)[better]
    return Tokens.joined(parts), torch.from_numpy(places)
