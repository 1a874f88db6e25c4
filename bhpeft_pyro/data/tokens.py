"""Token sequences of any length, end to end in one tensor, and how texts become them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.isolation import locked
from ..base.progress import tracked

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
