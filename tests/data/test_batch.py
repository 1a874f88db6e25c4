"""Batches: every example its due, with little padding, and shares for draws."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tables import numbered
from torch import Tensor
from toy_tokenizers import bert_like, texts_of

from bhpeft_pyro.data import Batch, Examples, encode
from bhpeft_pyro.data.batch import shuffled
from bhpeft_pyro.errors import DataError

LENGTHS = [1 + (7 * i * i) % 40 for i in range(101)]


def members(batch: Batch) -> list[int]:
    assert batch.labels is not None
    return batch.labels.int().tolist()


def test_in_order_is_in_order() -> None:
    batches = list(numbered(LENGTHS).batches(8))
    assert [i for batch in batches for i in members(batch)] == list(range(101))
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    # No batch is padded beyond its own longest text.
    for batch in batches:
        longest = max(LENGTHS[i] for i in members(batch)) + 2
        assert batch.inputs["input_ids"].shape == (len(batch), longest)
    sizes = [b.inputs["input_ids"].shape[1] for _, b in numbered(LENGTHS).by_length(7)]
    assert sizes == sorted(sizes, reverse=True)  # if memory is short, it is at once


def padding(batches: Any, of: str = "attention_mask") -> float:
    masks = [(b.choices if of == "choices" else b.inputs[of]).float() for b in batches]
    return 1 - float(sum(m.sum() for m in masks)) / sum(m.numel() for m in masks)


def test_buckets_reduce_padding() -> None:
    examples = numbered(random.Random(0).choices(range(1, 61), k=800))
    plain = padding(examples.batches(16))
    assert plain > 0.35
    assert padding(examples.batches(16, shuffle=True)) < 0.3 * plain
    assert padding(batch for _, batch in examples.by_length(16)) < 0.02


def test_buckets_keep_alike_choices_together() -> None:
    counts = [2 + (i * 7919) % 7 for i in range(320)]
    rows = [
        (text, texts_of([1 + (i + k) % 3 for k in range(counts[i])]))
        for i, text in enumerate(texts_of([1 + (31 * i) % 11 for i in range(320)]))
    ]
    examples: Examples = encode(rows, bert_like(), kind="choice", labelled=False)
    plain = padding(examples.batches(8), "choices")
    assert padding(examples.batches(8, shuffle=True), "choices") < 0.4 * plain
    assert padding((batch for _, batch in examples.by_length(8)), "choices") < 0.05 * plain


def test_batches_within_a_number_of_tokens() -> None:
    examples = numbered(LENGTHS)
    plan = examples.plan(8, most=90)
    assert torch.cat(plan).tolist() == torch.cat(examples.plan(8)).tolist()
    sizes = [examples.batch(indices).inputs["input_ids"].shape for indices in plan]
    assert all(rows * length <= 90 for rows, length in sizes)
    # None has room for one more.
    assert all(rows == 8 or (rows + 1) * length > 90 for rows, length in sizes[:-1])
    assert {rows for rows, _ in sizes} >= {2, 8}
    assert [*map(len, examples.plan(8, most=1))] == [1] * 101  # each is too long, and alone


def test_tokens_of_choices_count() -> None:
    rows = [("w", texts_of([6] * (2 + i % 3))) for i in range(60)]
    choices: Examples = encode(rows, bert_like(), kind="choice", labelled=False)
    tokens = [
        choices.batch(indices).inputs["input_ids"].numel() for indices in choices.plan(32, most=200)
    ]
    assert 100 < max(tokens) <= 200


def test_seeds_and_epochs() -> None:
    examples = numbered(LENGTHS)

    def order(generator: torch.Generator | None) -> list[list[int]]:
        return [members(b) for b in examples.batches(8, shuffle=True, generator=generator)]

    one, other = (order(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert order(torch.Generator().manual_seed(0)) == one != other
    torch.manual_seed(5)
    first, second = order(None), order(None)
    torch.manual_seed(5)
    assert order(None) == first
    # Sorting must not put the same examples together each time.
    assert not {*map(frozenset, first)} & {*map(frozenset, second)}


@pytest.mark.parametrize(
    ("count", "batch_size", "multiple", "steps", "width"),
    [
        (40, 8, 4, 5, 8),
        (41, 8, 4, 6, 8),
        (33, 32, 1, 2, 17),
        (10, 32, 1, 1, 10),
        (10, 32, 4, 1, 12),
        (3, 32, 4, 1, 4),
        (1, 32, 4, 1, 4),
        (100, 10, 4, 13, 8),
        (9, 4, 1, 3, 3),
    ],
)
def test_an_epoch(count: int, batch_size: int, multiple: int, steps: int, width: int) -> None:
    plan = shuffled(torch.arange(count) % 5, batch_size, multiple, None)
    assert [len(batch) for batch in plan] == [width] * steps
    times = torch.cat(plan).bincount(minlength=count)
    assert int(times.max()) - int(times.min()) <= 1 and int(times.min()) >= 1
    if steps > 1:
        assert all(len(batch.unique()) == width for batch in plan)


@pytest.mark.parametrize(("count", "multiple"), [(37, 4), (83, 1), (90, 4), (3, 4)])
def test_steps_are_unbiased(count: int, multiple: int) -> None:
    """E[(N/B) * sum over a batch] is the sum over the data, at each step, whatever the lengths.

    The values go with the lengths, so batches of like length must not come early or late, and
    those seen twice must not be the long ones.
    """
    generator = torch.Generator().manual_seed(count)
    lengths = torch.arange(count) ** 2 % 50 + 1
    values = lengths.double() ** 2
    epochs = 800
    steps: list[Tensor] = []
    times = torch.zeros(count)
    for _ in range(epochs):
        plan = shuffled(lengths, 8, multiple, generator)
        steps.append(torch.stack([count / len(b) * values[b].sum() for b in plan]))
        times += torch.cat(plan).bincount(minlength=count)
    estimates = torch.stack(steps)  # (epochs, steps)
    total = values.sum()
    for mean in (estimates.mean(1), estimates[:, 0], estimates[:, -1]):
        error = float(mean.std()) / math.sqrt(epochs)
        assert abs(float(mean.mean() - total)) <= 4 * error + 1e-9 * float(total)
    # Each example as often as any other.
    share = times.sum() / count / epochs
    odds = float(share - share.floor())
    error = math.sqrt(odds * (1 - odds) / epochs)
    assert ((times / epochs - share).abs() <= 4.5 * error + 1e-6).all()


def test_parts_for_weight_draws_are_alike() -> None:
    """Batches are split in order over the draws: the first must not get all the long texts."""
    examples = numbered(random.Random(0).choices(range(1, 61), k=400))
    gaps = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for batch in examples.batches(16, shuffle=True, multiple_of=4, generator=generator):
            lengths = batch.inputs["attention_mask"].sum(1).float().reshape(4, -1).mean(1)
            gaps.append(lengths[0] - lengths[-1])
    gap = torch.stack(gaps)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))


def test_errors_come_at_the_call() -> None:
    with pytest.raises(DataError, match="batch_size=2 is below multiple"):
        numbered([1, 2, 3, 4, 5]).batches(2, multiple_of=4, shuffle=True)
