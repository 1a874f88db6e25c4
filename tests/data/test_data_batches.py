"""Batches: every example its due, in the right order, with little padding."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_tokenizers import bert_like, gpt_like, texts_of

from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.data.batch import Batch, shuffled
from bhpeft_pyro.errors import DataError

LENGTHS = [1 + (7 * i * i) % 40 for i in range(101)]


def numbered(lengths: list[int], tokenizer: Any = None) -> Examples:
    """Examples whose rating is their number, so that a batch says what is in it."""
    data = {"text": texts_of(lengths), "label": [float(i) for i in range(len(lengths))]}
    return encode(data, tokenizer or bert_like(), kind="rating")


def quiz(counts: list[int], lengths: list[int]) -> Examples:
    rows = [
        {
            "question": text,
            "choices": texts_of([1 + (i + k) % 3 for k in range(n)]),
            "answer": n - 1,
        }
        for i, (n, text) in enumerate(zip(counts, texts_of(lengths), strict=True))
    ]
    return encode(rows, bert_like(), kind="choice")


def members(batch: Batch) -> list[int]:
    assert batch.labels is not None
    return batch.labels.int().tolist()


def real_tokens(batch: Batch) -> list[list[int]]:
    inputs = batch.inputs
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def test_in_order_is_in_order() -> None:
    examples = numbered(LENGTHS)
    batches = list(examples.batches(8))
    assert [i for batch in batches for i in members(batch)] == list(range(101))
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    assert all(batch.size == 101 for batch in batches)
    # No batch is padded beyond its own longest text.
    for batch in batches:
        longest = max(LENGTHS[i] for i in members(batch)) + 2
        assert batch.inputs["input_ids"].shape == (len(batch), longest)


@pytest.mark.parametrize("multiple", [1, 4])
def test_labels_and_tokens_stay_together(multiple: int) -> None:
    examples = numbered(LENGTHS)
    expected = [row for batch in examples.batches(1) for row in real_tokens(batch)]
    for batch in examples.batches(8, shuffle=True, multiple_of=multiple):
        assert real_tokens(batch) == [expected[i] for i in members(batch)]


@pytest.mark.parametrize("kind", ["rating", "choice"])
def test_by_length_scatters_back(kind: str) -> None:
    if kind == "rating":
        examples = numbered(LENGTHS)
    else:
        examples = quiz([2 + i % 7 for i in range(30)], [1 + (5 * i) % 11 for i in range(30)])
    sums = torch.zeros(len(examples), dtype=torch.long)
    seen = torch.zeros(len(examples), dtype=torch.long)
    widths = []
    for indices, batch in examples.by_length(7):
        mask = batch.inputs["attention_mask"]
        if batch.choices is not None:
            mask = mask * batch.choices.unsqueeze(-1)
        sums[indices] = (batch.inputs["input_ids"] * mask).flatten(1).sum(1)
        seen[indices] += 1
        widths.append(batch.inputs["input_ids"][0].numel())
        assert batch.labels is not None and examples.labels is not None
        assert torch.equal(batch.labels, examples.labels[indices])
    assert (seen == 1).all()
    assert widths[0] == max(widths)  # if memory is short, it is at once
    for i, batch in enumerate(examples.batches(1)):
        mask = batch.inputs["attention_mask"]
        assert int(sums[i]) == int((batch.inputs["input_ids"] * mask).sum())


def padding(batches: list[Batch]) -> float:
    masks = [batch.inputs["attention_mask"].float() for batch in batches]
    return 1 - float(sum(m.sum() for m in masks)) / sum(m.numel() for m in masks)


def test_buckets_reduce_padding() -> None:
    lengths = random.Random(0).choices(range(1, 61), k=800)
    examples = numbered(lengths)
    plain = padding(list(examples.batches(16)))
    grouped = padding(list(examples.batches(16, shuffle=True)))
    sorted_ = padding([batch for _, batch in examples.by_length(16)])
    assert plain > 0.35
    assert grouped < 0.3 * plain
    assert sorted_ < 0.02


def test_buckets_keep_alike_choices_together() -> None:
    examples = quiz(
        [2 + (i * 7919) % 7 for i in range(320)], [1 + (31 * i) % 11 for i in range(320)]
    )

    def dummies(batches: Any) -> float:
        there = torch.cat([batch.choices.flatten().float() for batch in batches])
        return 1 - float(there.mean())

    plain = dummies(examples.batches(8))
    assert dummies(examples.batches(8, shuffle=True)) < 0.4 * plain
    assert dummies(batch for _, batch in examples.by_length(8)) < 0.05 * plain


def test_seeds() -> None:
    examples = numbered(LENGTHS)

    def order(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [members(b) for b in examples.batches(8, shuffle=True, generator=generator)]

    assert order(0) == order(0) != order(1)
    torch.manual_seed(5)
    first = [members(b) for b in examples.batches(8, shuffle=True)]
    second = [members(b) for b in examples.batches(8, shuffle=True)]
    torch.manual_seed(5)
    assert [members(b) for b in examples.batches(8, shuffle=True)] == first != second


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


def test_batches_differ_from_epoch_to_epoch() -> None:
    """Sorting must not put the same examples together each time."""
    examples = numbered(LENGTHS)
    one = {frozenset(members(b)) for b in examples.batches(10, shuffle=True)}
    two = {frozenset(members(b)) for b in examples.batches(10, shuffle=True)}
    assert not one & two


def test_errors_come_at_the_call() -> None:
    examples = numbered([1, 2, 3, 4, 5])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": 2, "multiple_of": 0, "shuffle": True}, "multiple_of=0"),
        (
            {"batch_size": 2, "multiple_of": 4, "shuffle": True},
            "batch_size=2 is below multiple_of=4",
        ),
    ]
    for options, message in cases:
        with pytest.raises(DataError, match=message):
            examples.batches(**options)
    with pytest.raises(DataError, match="batch_size=0"):
        examples.by_length(0)


@pytest.mark.parametrize("kind", ["rating", "choice"])
def test_subset_and_concat(kind: str) -> None:
    if kind == "rating":
        examples = numbered([3, 1, 4, 1, 5])
    else:
        examples = quiz([2, 5, 3, 8, 2], [3, 1, 4, 1, 5])
    part = examples.subset([3, 0])
    assert part.texts == (examples.texts[3], examples.texts[0])
    for own, other in ((0, 3), (1, 0)):
        one, two = part.subset([own]), examples.subset([other])
        a, b = next(one.batches(1)), next(two.batches(1))
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert one.fingerprint == two.fingerprint
    whole = examples.subset(torch.tensor([0, 1])).concat(
        examples.subset([2]), examples.subset(range(3, 5))
    )
    assert whole.fingerprint == examples.fingerprint
    assert whole.texts == examples.texts
    assert torch.equal(whole.lengths, examples.lengths)
    for bad in ([], [5], [-1], [0.5], [True, False]):
        with pytest.raises(DataError, match="ind"):
            examples.subset(bad)  # type: ignore[arg-type]


def test_concat_refuses_strangers() -> None:
    texts = texts_of([1, 2])
    ab = encode({"text": texts, "label": ["a", "b"]}, bert_like(), kind="class")
    ac = encode({"text": texts, "label": ["a", "c"]}, bert_like(), kind="class")
    with pytest.raises(DataError, match="differ in label_names"):
        ab.concat(ac)
    with pytest.raises(DataError, match="differ in kind, presence of labels"):
        numbered([1, 2]).concat(encode(texts, bert_like(), kind="class", labelled=False))
    with pytest.raises(DataError, match="differ in tokenizer"):
        numbered([1, 2]).concat(numbered([1, 2], gpt_like()))
    three = encode({"text": texts, "label": [0, 2]}, bert_like(), kind="class")
    five = encode({"text": texts, "label": [0, 4]}, bert_like(), kind="class")
    assert three.concat(five).num_labels == five.concat(three).num_labels == 5


def test_fingerprints() -> None:
    texts = texts_of([3, 2, 4])

    def mark(texts: list[str], labels: list[Any] | None, kind: Any = "class") -> str:
        data: dict[str, Any] = (
            {"text": texts} if labels is None else {"text": texts, "label": labels}
        )
        return encode(data, bert_like(), kind=kind, labelled=labels is not None).fingerprint

    base = mark(texts, [0, 1, 1])
    assert base == mark(list(texts), [0, 1, 1])
    assert base == mark([texts[2], texts[0], texts[1]], [1, 0, 1])  # in another order
    others = [
        mark([*texts, texts[0]], [0, 1, 1, 0]),  # twice is not once
        mark(texts, [0, 1, 0]),
        mark(texts, None),
        mark(texts, [0.0, 1.0, 1.0], "rating"),
        mark(texts[::-1], [0, 1, 1]),
        mark([*texts[:2], texts[2] + " a"], [0, 1, 1]),
    ]
    assert len({base, *others}) == 7
    # The same sequences shared out differently over the questions.
    quizzes = [
        encode(
            [("why", ["a"] * first), ("why", ["a"] * (6 - first))],
            gpt_like(),
            kind="choice",
            labelled=False,
        )
        for first in (2, 3)
    ]
    assert quizzes[0].fingerprint != quizzes[1].fingerprint
