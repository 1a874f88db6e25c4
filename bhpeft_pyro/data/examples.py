"""`Examples`: a tokenised data set in memory, which yields batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import DataError
from .batch import Batch, random_order, shuffled, within
from .columns import Kind
from .copies import apart, fingerprint_of
from .labels import placed
from .tokens import Tokens, cat

_FEW, _HELD_OUT = 50, 500  # rows of which some are held out, and how many at most


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """N tokenised examples; made by `encode`.

    Attributes:
        kind: "class", "labels", "rating" or "choice".
        tokens: the token ids; one sequence an example, or one a choice.
        labels: (N,) int64 classes or answers, float32 ratings; (N, K) float32 for kind "labels", 1
            where a text has a label; None if there are none.
        texts: the N texts (questions for "choice"), to show.
        label_names: names of the classes (kinds "class" and "labels").
        counts: (N,) number of choices (kind "choice").
        probe: ids by which another tokenizer is recognised.
        hashes: (N,) int64 of all texts of an example, the same for copies.
        extra: further columns of numbers by name, each (N,) float32.

    >>> from bhpeft_pyro.data import encode
    >>> from bhpeft_pyro.testing import tiny_tokenizer
    >>> table = {"text": ["w5", "w6 w7", "w5 w8"], "label": ["+", "-", "+"]}
    >>> data = encode(table, tiny_tokenizer(), kind="class")
    >>> data
    Examples(3 of kind 'class', labels ('+', '-'))
    >>> batch = next(data.batches(2))
    >>> batch.inputs["input_ids"].tolist(), batch.labels.tolist(), batch.size
    ([[5, 0], [6, 7]], [0, 1], 3)
    """

    kind: Kind
    tokens: Tokens
    labels: Tensor | None
    texts: tuple[str, ...]
    label_names: tuple[str, ...] | None
    counts: Tensor | None
    probe: tuple[int, ...]
    hashes: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    @property
    def copies(self) -> int:
        """How many examples have the text of another one; of several alike, all but one."""
        return len(self) - len(self.hashes.unique())

    def __repr__(self) -> str:
        what = "no labels" if self.labels is None else f"labels {self.label_names or ''}".strip()
        return f"Examples({len(self)} of kind {self.kind!r}, {what})"

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
    def choices(self) -> Tensor | None:
        """(N, C) which choices exist, with C the most of any example (kind "choice")."""
        if self.counts is None:
            return None
        return torch.arange(int(self.counts.max())) < self.counts.unsqueeze(-1)

    @property
    def width(self) -> int:
        """The most choices of any example; 1 for other kinds."""
        return 1 if self.choices is None else self.choices.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over token ids and labels, the same for the same examples in any order."""
        return fingerprint_of(self)

    @property
    def few(self) -> bool:
        """Whether there are fewer than 50, too few to hold some out."""
        return len(self) < _FEW

    def hold_out(self, seed: int, share: float | None = None) -> tuple[Examples, Examples | None]:
        """The examples without a random `share`, and that share; None if it has none, or all.

        By default it is a fifth, but 500 at most, and none of fewer than 50 different ones. Both
        parts keep their order. Examples with the same text (copies) stay together; the share may
        then be smaller. Examples of a class that would be held out whole are not.
        """
        if share is None:
            few = len(self) - self.copies < _FEW
            count = 0 if few else min(len(self) // 5, _HELD_OUT)
        else:
            count = round(share * len(self))
        rest, held_out = apart(random_order(len(self), seed), self.hashes, count)
        if self.kind == "class" and self.labels is not None:
            lost = ~torch.isin(self.labels, self.labels[rest])
            back = torch.isin(self.hashes[held_out], self.hashes[lost])
            rest, held_out = torch.cat([rest, held_out[back]]), held_out[~back]
        if not (len(rest) and len(held_out)):
            return self, None
        return self.subset(rest.sort().values), self.subset(held_out.sort().values)

    def subset(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples `indices` in that order, as PyTorch indexes: negative ones count from the
        end, and a mask (N,) takes those where it is True; its IndexError for one beyond the end."""
        chosen = torch.arange(len(self))[torch.as_tensor(indices)]
        rows, present = self._rows(chosen)
        return replace(
            self,
            tokens=self.tokens.take(rows if present is None else rows[present]),
            labels=None if self.labels is None else self.labels[chosen],
            texts=tuple(self.texts[i] for i in chosen.tolist()),
            counts=None if self.counts is None else self.counts[chosen],
            hashes=self.hashes[chosen],
            extra={name: values[chosen] for name, values in self.extra.items()},
        )

    def concat(self, *others: Examples) -> Examples:
        """These examples, then those of `others`; all or none have labels.

        Raises:
            DataError: another kind, other label names, another tokenizer, other extra
                columns.
        """
        parts = (self, *others)
        for other in others:
            same = {
                "kind": other.kind == self.kind,
                "label_names": other.label_names == self.label_names,
                "tokenizer": other.probe == self.probe and other.tokens.pad == self.tokens.pad,
                "presence of labels": (other.labels is None) == (self.labels is None),
                "extra columns": other.extra.keys() == self.extra.keys(),
            }
            wrong = [name for name, agrees in same.items() if not agrees]
            if wrong:
                raise DataError(f"{self} and {other} differ in {', '.join(wrong)}")
        return replace(
            self,
            tokens=Tokens.joined([part.tokens for part in parts]),
            labels=cat([part.labels for part in parts]),
            texts=tuple(text for part in parts for text in part.texts),
            counts=cat([part.counts for part in parts]),
            hashes=torch.cat([part.hashes for part in parts]),
            extra={name: torch.cat([part.extra[name] for part in parts]) for name in self.extra},
        )

    def among(self, names: Sequence[str]) -> Examples:
        """The same with their classes among all of `names`; numbered classes are places in names
        that are no numbers.

        Raises:
            DataError: a class is not.
        """
        names, there = tuple(names), self.label_names
        if there == names:
            return self
        there = None if there is None else placed(there, names)
        if not {*(there or ())} <= {*names}:
            raise DataError(f"source has the classes {there}; expected {names}")
        labels = self.labels
        if labels is not None and there is not None:
            places = torch.tensor([names.index(name) for name in there])
            if self.kind == "class":
                labels = places[labels]
            else:
                labels = labels.new_zeros(len(self), len(names)).index_copy(1, places, labels)
        return replace(self, labels=labels, label_names=names)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        multiple_of: int = 1,
        states: Tensor | None = None,
    ) -> Iterator[Batch]:
        """One pass over the data.

        Without `shuffle` each example comes exactly once, in order; the last batch may be smaller.
        With `shuffle` batches are random, group examples of similar length, and all have one size;
        a few random examples appear twice to fill the last batch. At every step (N / B) * (sum
        over the batch) is an unbiased estimate of the sum over the data, so the ELBO's gradient is
        unbiased too.

        Args:
            batch_size: the most examples a batch may have.
            generator: for the shuffling; torch's global one by default.
            multiple_of: with `shuffle`, the number of weight draws that share each batch, which
                must divide its size.
            states: (total, D) one vector for each token of `tokens`, for `Batch.states`.

        Raises:
            DataError: the sizes cannot work. Raised at the call, not at the first batch.
        """
        if shuffle:
            plan = shuffled(self._keys, batch_size, multiple_of, generator)
        else:
            plan = within(torch.arange(len(self)), self.lengths, batch_size)
        return (self.batch(indices, states) for indices in plan)

    def by_length(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Pairs of indices (B,) and their batch, longest examples first, each exactly once.

        For prediction, with hardly any padding: `out[indices] = outputs` restores the order.
        """
        return ((indices, self.batch(indices)) for indices in self.plan(batch_size))

    def plan(self, batch_size: int, most: int | None = None) -> tuple[Tensor, ...]:
        """The indices of each batch of `by_length`. Batches have at most `most` tokens, unless they
        are of a single example."""
        order = self._keys.argsort(descending=True, stable=True)
        sizes = self.lengths if self.counts is None else self.lengths * self.counts
        return within(order, sizes, batch_size, most)

    @property
    def _keys(self) -> Tensor:
        """(N,) sort keys that put similar examples together: by choices, then by length."""
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

    def batch(self, indices: Tensor, states: Tensor | None = None) -> Batch:
        """The examples `indices` as one batch; `states` are as for `batches`."""
        rows, present = self._rows(indices)
        if states is not None:
            at, real = self.tokens.places(rows, present)
            states = states[at].masked_fill_(~real.unsqueeze(-1), 0)
        return Batch(
            inputs=self.tokens.padded(rows, present),
            labels=None if self.labels is None else self.labels[indices],
            size=len(self),
            choices=present,
            states=states,
            extra={name: values[indices] for name, values in self.extra.items()},
        )
