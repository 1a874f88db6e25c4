"""Examples: whatever is done with them, each keeps what is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import every_kind, numbered, readings
from toy_tokenizers import bert_like, gpt_like, texts_of

from bhpeft_pyro.data import Columns, Examples, copies, encode, tokens
from bhpeft_pyro.errors import DataError

KINDS = ("class", "rating", "labels", "choice")


def whole(examples: Examples) -> list[Any]:
    return readings(next(examples.batches(len(examples))))


@pytest.fixture(scope="module")
def each() -> dict[str, Examples]:
    return every_kind()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_keep_what_belongs_together(each: dict[str, Examples], kind: str) -> None:
    examples = each[kind]
    expected, count = whole(examples), len(examples)
    assert [row for batch in examples.batches(3) for row in readings(batch)] == expected
    seen = torch.zeros(count)
    for indices, batch in examples.by_length(4):
        assert readings(batch) == [expected[i] for i in indices]
        seen[indices] += 1
    assert (seen == 1).all()
    for batch in examples.batches(6, shuffle=True, multiple_of=2):
        assert batch.size == count and len(batch) % 2 == 0
        assert all(row in expected for row in readings(batch))
        assert readings(batch.split(2)) == readings(batch.split(1).split(2)) == readings(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_their_sums_keep_what_belongs_together(
    each: dict[str, Examples], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = each[kind]
    expected, chosen = whole(examples), torch.tensor([9, 0, 4, 4, 7, 1, 2])
    part = examples.subset(chosen)
    assert whole(part) == [expected[i] for i in chosen]
    assert part.texts == tuple(examples.texts[i] for i in chosen)
    both = part.concat(examples, examples.subset([3]))
    assert whole(both) == [*(expected[i] for i in chosen), *expected, expected[3]]
    turned = examples.subset(range(len(examples) - 1, -1, -1))
    assert turned.fingerprint == examples.fingerprint != part.fingerprint
    monkeypatch.setattr(tokens, "CHUNK", 2)
    assert whole(examples.subset(chosen)) == whole(part)


def test_fingerprints_stay_those_of_saved_posteriors(each: dict[str, Examples]) -> None:
    """They are in the reports of saved rounds, which know by them what was learnt."""
    known = ["e6721bdd65e05e02", "5a4f173a69336e16", "c2716b1ff6ec5788", "44763a2ed4a287c1"]
    assert [copies.fingerprint_of(each[kind])[:16] for kind in KINDS] == known


def test_fingerprints_know_what_differs() -> None:
    texts = texts_of([3, 2, 4])

    def mark(texts: Any, labels: Any, kind: Any = "class", **extra: Any) -> str:
        data = {"text": texts} | ({} if labels is None else {"label": labels}) | extra
        how = Columns(extra=tuple(extra))
        labelled = labels is not None
        return encode(data, bert_like(), kind=kind, columns=how, labelled=labelled).fingerprint

    def asked(first: int) -> str:
        rows = [("why", ["a"] * first), ("why", ["a"] * (6 - first))]
        return encode(rows, gpt_like(), kind="choice", labelled=False).fingerprint

    base = mark(texts, [0, 1, 1])
    assert base == mark(list(texts), [0, 1, 1])
    others = [
        base,
        mark([*texts, texts[0]], [0, 1, 1, 0]),  # twice is not once
        mark(texts, [0, 1, 0]),
        mark(texts, None),
        mark(texts, [0.0, 1.0, 1.0], "rating"),
        mark(texts, [[0, 1], [1, 1], [0, 0]], "labels"),
        mark(texts, [[0, 1], [1, 1], [0, 1]], "labels"),
        mark(texts[::-1], [0, 1, 1]),
        mark([*texts[:2], texts[2] + " a"], [0, 1, 1]),
        mark(texts, [0, 1, 1], hours=[1, 2, 3]),
        mark(texts, [0, 1, 1], hours=[1, 2, 4]),
        asked(2),  # the same sequences shared out differently over the questions
        asked(3),
    ]
    assert len({*others}) == len(others)


def test_subsets_are_those_of_a_tensor() -> None:
    examples = numbered([3, 1, 4, 1, 5])
    for chosen in ([1, 2], [-4, 2], [False, True, True, False, False]):
        assert examples.subset(chosen).texts == examples.texts[1:3]
    for bad in ([], [5], [0.5], [True, False]):
        with pytest.raises(IndexError):
            examples.subset(bad)


def test_what_differs_is_not_put_together(each: dict[str, Examples]) -> None:
    texts = texts_of([1, 2])

    def encoded(labels: Any, kind: Any = "class", **how: Any) -> Examples:
        return encode({"text": texts, "label": labels}, bert_like(), kind=kind, **how)

    bare = encode(texts, bert_like(), kind="class", labelled=False)
    for one, other, what in (
        (encoded(["a", "b"]), encoded(["a", "c"]), "label_names"),
        (numbered([1, 2]), bare, "kind, presence of labels"),
        (numbered([1, 2]), numbered([1, 2], gpt_like()), "tokenizer"),
        (encoded([[1, 0]] * 2, "labels"), encoded([[1, 0, 1]] * 2, "labels"), "label_names"),
        (each["rating"], each["class"], "kind, label_names, extra columns"),
    ):
        with pytest.raises(DataError, match=f"differ in {what}"):
            one.concat(other)
    three, five = encoded([0, 2], classes=5), encoded([0, 4], classes=5)
    assert three.concat(five).label_names == ("0", "1", "2", "3", "4")
