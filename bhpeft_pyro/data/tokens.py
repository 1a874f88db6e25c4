"""Token ids of texts of any length, end to end in one tensor, and their padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError

__all__ = ["Tokens", "join_pairs", "limit_of", "padding_id", "probe", "tokenise"]

_CHUNK = 10_000  # rows given to the tokenizer at once: bounds the memory its result takes


@dataclass(frozen=True, eq=False)
class Tokens:
    """R token sequences.

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

    @cached_property
    def starts(self) -> Tensor:
        """(R,) where in `ids` each sequence begins."""
        return self.lengths.cumsum(0) - self.lengths

    def take(self, rows: Tensor) -> Tokens:
        """The sequences `rows` (K,), in that order."""
        lengths = self.lengths[rows]
        shift = self.starts[rows] - (lengths.cumsum(0) - lengths)
        at = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        types = None if self.types is None else self.types[at]
        return Tokens(self.ids[at], types, lengths, self.pad, self.pad_type)

    def padded(self, rows: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """What the transformer gets for the sequences `rows` (...), padded on the right: (..., T).

        Where `present` (...) is False the row is a dummy, all padding, with its first token
        visible: attention over no token at all would be NaN.
        """
        lengths = self.lengths[rows]
        if present is not None:
            lengths = lengths * present
        offsets = torch.arange(int(lengths.max()))
        real = offsets < lengths.unsqueeze(-1)
        at = (self.starts[rows].unsqueeze(-1) + offsets).masked_fill(~real, 0)
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


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, or the end-of-text token's (GPT-2, Llama), or 0: it is masked anyway."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int | None, pair: bool) -> int | None:
    """The most tokens a sequence may have; None if neither user nor tokenizer set a limit."""
    if max_length is None:
        limit = tokenizer.model_max_length
        return limit if limit < 10**6 else None  # "no limit" is a very large number there
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if type(max_length) is not int or max_length < least:
        raise DataError(f"max_length={max_length!r}; expected an integer of at least {least}")
    return max_length


def join_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two texts become one, as for decoders, which have no separator token."""
    return tokenizer.sep_token_id is None


def probe(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Vocabulary size and ids of a fixed text: tokenizers that agree on them pass for the same."""
    text = "The 2nd quick-brown fox didn't jump; 'na\u00efve' caf\u00e9s, $1,984.50!"
    ids = tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
    return (len(tokenizer), *ids)


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    limit: int | None,
) -> tuple[Tokens, Tensor]:
    """Tokens of R texts (or pairs of texts), and which (R,) of them had to be cut to `limit`.

    Two texts with a separator between them are cut longest first. Joined texts lose their
    beginning: cutting the end could leave nothing of the second text, and make all choices equal.
    """
    cutter = tokenizer
    if pairs is not None and join_pairs(tokenizer):
        texts = [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]
        pairs = None
        if limit is not None and tokenizer.truncation_side != "left":
            cutter = copy.deepcopy(tokenizer)  # the caller's stays as it is
            cutter.truncation_side = "left"

    ids: list[Tensor] = []
    types: list[Tensor] = []
    lengths: list[int] = []
    cut: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        first = list(texts[start : start + _CHUNK])
        second = None if pairs is None else list(pairs[start : start + _CHUNK])
        encoded = _call(tokenizer, first, second, None)
        over = [i for i, row in enumerate(encoded["input_ids"]) if limit and len(row) > limit]
        if over:
            again = None if second is None else [second[i] for i in over]
            shorter = _call(cutter, [first[i] for i in over], again, limit)
            for name, rows in encoded.items():
                for i, row in zip(over, shorter[name], strict=True):
                    rows[i] = row
        cut += [start + i for i in over]
        lengths += [len(row) for row in encoded["input_ids"]]
        ids.append(_flat(encoded["input_ids"]))
        if "token_type_ids" in encoded:
            types.append(_flat(encoded["token_type_ids"]))

    tokens = Tokens(
        ids=torch.cat(ids),
        types=torch.cat(types) if types else None,
        lengths=torch.tensor(lengths),
        pad=padding_id(tokenizer),
        pad_type=int(tokenizer.pad_token_type_id),
    )
    was_cut = torch.zeros(len(lengths), dtype=torch.bool)
    was_cut[cut] = True
    return tokens, was_cut


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, limit: int | None
) -> dict[str, list[list[int]]]:
    return dict(
        tokenizer(
            texts,
            pairs,
            padding=False,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )
    )


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32)
