"""`Examples`: a tokenised data set in memory, which yields batches.

Examples as plain data and tensors, for files that are not pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .batch import Batch, in_order, shuffled
from .columns import Kind
from .tokens import Tokens

__all__ = [
    "Examples",
    "describe",
    "revive",
]


_FEW, _HELD_OUT = 50, 500  # rows of which some are held out, and how many at most


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """N tokenised examples; made by `encode`.

    Attributes:
        kind: "class", "rating" or "choice".
        tokens: the token ids; one sequence an example, or one a choice.
        labels: (N,) int64 classes or answers, float32 ratings; None if there are none.
        texts: the N texts (questions for "choice"), to show.
        label_names: names of the classes, where they have any.
        num_labels: number of classes (kind "class" with labels or names).
        counts: (N,) number of choices (kind "choice").
        cut: (N,) bool, which examples were too long and are not complete.
        probe: ids by which another tokenizer is recognised.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "good": 1, "bad": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    >>> from bhpeft_pyro.data import encode
    >>> data = encode({"text": ["good", "bad bad", "good good"], "label": ["+", "-", "+"]},
    ...               tokenizer, kind="class")
    >>> data
    Examples(3 of kind 'class', labels ('+', '-'))
    >>> batch = next(data.batches(2))
    >>> batch.inputs["input_ids"].tolist(), batch.labels.tolist(), batch.size
    ([[1, 0], [2, 2]], [0, 1], 3)
    """

    kind: Kind
    tokens: Tokens
    labels: Tensor | None
    texts: tuple[str, ...]
    label_names: tuple[str, ...] | None
    num_labels: int | None
    counts: Tensor | None
    cut: Tensor
    probe: tuple[int, ...]

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def __repr__(self) -> str:
        what = "no labels" if self.labels is None else f"labels {self.label_names or ''}".strip()
        return f"Examples({len(self)} of kind {self.kind!r}, {what})"

    @property
    def truncated(self) -> int:
        """How many examples were too long and have been cut."""
        return int(self.cut.sum())

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) number of tokens; of the longest choice for kind "choice"."""
        if self.counts is None:
            return self.tokens.lengths
        owner = torch.arange(len(self)).repeat_interleave(self.counts)
        return torch.zeros_like(self.counts).scatter_reduce(
            0, owner, self.tokens.lengths, "amax", include_self=True
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over token ids and labels, the same for the same examples in any order."""
        owners = [1] * len(self) if self.counts is None else self.counts.tolist()
        lengths = self.tokens.lengths.split(owners)
        spans = [int(own.sum()) for own in lengths]
        parts = {"lengths": lengths, "ids": self.tokens.ids.split(spans)}
        if self.tokens.types is not None:
            parts["types"] = self.tokens.types.split(spans)
        if self.labels is not None:
            parts["labels"] = self.labels.split(1)
        digests = []
        for example in zip(*parts.values(), strict=True):
            digest = hashlib.sha256()
            for tensor in example:
                digest.update(len(tensor).to_bytes(8, "little"))
                kind = "<f4" if tensor.is_floating_point() else "<i8"
                digest.update(tensor.numpy().astype(kind).tobytes())
            digests.append(digest.digest())
        what = f"{self.kind} {' '.join(parts)}"
        return hashlib.sha256(what.encode() + b"".join(sorted(digests))).hexdigest()

    def hold_out(self, seed: int) -> tuple[Examples, Examples | None]:
        """A fifth of the examples apart, 500 at most; none of fewer than 50.

        Args:
            seed: of the choice.

        Returns:
            The rest, in its order, and those held out.
        """
        if len(self) < _FEW:
            return self, None
        count = min(len(self) // 5, _HELD_OUT)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[count:].sort().values), self.subset(order[:count].sort().values)

    def subset(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples `indices`, in that order.

        Raises:
            DataError: no index, or one outside 0..N-1.
        """
        chosen = torch.as_tensor(indices)
        if chosen.dim() != 1 or len(chosen) == 0:
            raise DataError(f"indices={indices!r:.60}; expected a list of one or more integers")
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise DataError(f"indices are of type {chosen.dtype}; expected integers")
        chosen = chosen.long()
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise DataError(
                f"indices go from {int(chosen.min())} to {int(chosen.max())}; "
                f"expected 0 to {len(self) - 1}"
            )
        rows, present = self._rows(chosen)
        return Examples(
            kind=self.kind,
            tokens=self.tokens.take(rows if present is None else rows[present]),
            labels=None if self.labels is None else self.labels[chosen],
            texts=tuple(self.texts[i] for i in chosen.tolist()),
            label_names=self.label_names,
            num_labels=self.num_labels,
            counts=None if self.counts is None else self.counts[chosen],
            cut=self.cut[chosen],
            probe=self.probe,
        )

    def concat(self, *others: Examples) -> Examples:
        """These examples, then those of `others`; all or none have labels.

        Raises:
            DataError: another kind, other label names, another tokenizer.
        """
        parts = (self, *others)
        for other in others:
            same = {
                "kind": other.kind == self.kind,
                "label_names": other.label_names == self.label_names,
                "tokenizer": other.probe == self.probe and other.tokens.pad == self.tokens.pad,
                "presence of labels": (other.labels is None) == (self.labels is None),
            }
            wrong = [name for name, agrees in same.items() if not agrees]
            if wrong:
                raise DataError(f"{self} and {other} differ in {', '.join(wrong)}")
        numbers = [part.num_labels for part in parts if part.num_labels is not None]
        lengths = torch.cat([part.tokens.lengths for part in parts])
        tokens = Tokens(
            ids=torch.cat([part.tokens.ids for part in parts]),
            types=_cat([part.tokens.types for part in parts]),
            lengths=lengths,
            pad=self.tokens.pad,
            pad_type=self.tokens.pad_type,
        )
        return Examples(
            kind=self.kind,
            tokens=tokens,
            labels=_cat([part.labels for part in parts]),
            texts=tuple(text for part in parts for text in part.texts),
            label_names=self.label_names,
            num_labels=max(numbers, default=None),
            counts=_cat([part.counts for part in parts]),
            cut=torch.cat([part.cut for part in parts]),
            probe=self.probe,
        )

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        multiple_of: int = 1,
        size: int | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass over the data.

        Without `shuffle`: in order, each example exactly once, the last batch maybe smaller.
        With it: random batches of examples of like length, all of one size, at most
        `batch_size`, a few examples at random appearing twice to fill the last one (with
        `drop_last`: left out at random). At every step (N / B) * (sum over the batch) is an
        unbiased estimate of the sum over the data, so the ELBO's gradient is unbiased too.

        Args:
            batch_size: at most so many examples a batch; rounded down to a multiple of
                `multiple_of`.
            generator: for the shuffling; torch's global one by default.
            multiple_of: the number of weight draws each batch is shared out over.
            size: `Batch.size`, if these examples stand for more than themselves.
            drop_last: only full batches.

        Raises:
            DataError: sizes that cannot work, at the call, not at the first batch.
        """
        if size is not None and (type(size) is not int or size < 1):
            raise DataError(f"size={size!r}; expected an integer of at least 1")
        if shuffle:
            plan = shuffled(self._keys, batch_size, multiple_of, drop_last, generator)
        else:
            plan = in_order(len(self), batch_size, multiple_of, drop_last)
        return (self._batch(indices, size) for indices in plan)

    def by_length(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Pairs of indices (B,) and their batch, longest examples first, each exactly once.

        For prediction, with next to no padding: `out[indices] = outputs` restores the order.
        """
        plan = in_order(len(self), batch_size, 1, False)
        order = self._keys.argsort(descending=True, stable=True)
        return ((order[at], self._batch(order[at], None)) for at in plan)

    @property
    def _keys(self) -> Tensor:
        """(N,) sort keys that put alike examples together: by choices, then by length."""
        if self.counts is None:
            return self.lengths
        return self.counts * (int(self.lengths.max()) + 1) + self.lengths

    def _rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences of the examples: (B,), or (B, C) with which of them exist."""
        if self.counts is None:
            return indices, None
        counts = self.counts[indices].unsqueeze(-1)
        first = (self.counts.cumsum(0) - self.counts)[indices].unsqueeze(-1)
        choice = torch.arange(int(counts.max()))
        present = choice < counts
        return (first + choice).masked_fill(~present, 0), present

    def _batch(self, indices: Tensor, size: int | None) -> Batch:
        rows, present = self._rows(indices)
        return Batch(
            inputs=self.tokens.padded(rows, present),
            labels=None if self.labels is None else self.labels[indices],
            size=len(self) if size is None else size,
            choices=present,
        )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


_TOKENS = ("ids", "types", "lengths")
_OWN = ("labels", "counts", "cut")
_PLAIN = ("kind", "texts", "label_names", "num_labels", "probe")


def describe(examples: Examples) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain data and tensors; `revive` makes the same examples of them.

    >>> from bhpeft_pyro.testing import tiny_examples
    >>> examples = tiny_examples(3)
    >>> revive(*describe(examples)).fingerprint == examples.fingerprint
    True
    """
    tokens = examples.tokens
    tensors = {name: getattr(tokens, name) for name in _TOKENS}
    tensors |= {name: getattr(examples, name) for name in _OWN}
    plain = {name: getattr(examples, name) for name in _PLAIN}
    plain |= {"pad": tokens.pad, "pad_type": tokens.pad_type}
    return plain, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def revive(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Examples:
    """The examples that were described."""
    tokens = Tokens(
        **{name: tensors.get(name) for name in _TOKENS},  # type: ignore[arg-type]
        pad=plain["pad"],
        pad_type=plain["pad_type"],
    )
    own: dict[str, Any] = {name: tensors.get(name) for name in _OWN}
    names = plain["label_names"]
    return Examples(
        kind=plain["kind"],
        tokens=tokens,
        texts=tuple(plain["texts"]),
        label_names=None if names is None else tuple(names),
        num_labels=plain["num_labels"],
        probe=tuple(plain["probe"]),
        **own,
    )
