"""Rows with the same text are learnt or held out, never both; and classes that may be mistakes."""

from __future__ import annotations

import unicodedata
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.data import Columns, Examples, LabelWarning, encode
from bhpeft_pyro.data.copies import hashes_of, warn_of_classes, warn_of_contradictions
from bhpeft_pyro.diagnostics.comparison import compare
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_examples, tiny_model, tiny_tokenizer

HOW: dict[str, Any] = {"max_steps": 1, "progress": False}
TEXTS = [f"w{5 + i % 2} w{10 + i // 2}" for i in range(60)]
LABELS = [i % 2 for i in range(60)]
ALIKE = [str.upper, lambda text: f" {text.replace(' ', '  ')}\n"]  # as far as `fit` can tell


def encoded(texts: list[str], labels: list[int]) -> Examples:
    return encode({"text": texts, "label": labels}, tiny_tokenizer(), kind="class")


def tripled() -> Examples:
    """Each text three times; two have other labels than the third."""
    texts = [*TEXTS, *map(ALIKE[0], TEXTS), *map(ALIKE[1], TEXTS)]
    return encoded(texts, LABELS + [1 - label for label in LABELS] * 2)


def test_texts_differ_by_more_than_case_spaces_and_unicode_form() -> None:
    form = unicodedata.normalize("NFD", "CAF\u00c9  no. 1")
    rows = [
        ("caf\u00e9 no. 1",),
        (form,),
        ("cafe no. 1",),
        ("caf\u00e9 no 1",),
        ("caf\u00e9", "no. 1"),
    ]
    first, *others = hashes_of(rows).tolist()
    assert [first == other for other in others] == [True, False, False, False]
    assert first == hashes_of(rows[1:])[0]  # in another table too


def test_without_copies_rows_are_held_out_as_ever() -> None:
    examples = encoded(TEXTS, LABELS)
    assert examples.copies == 0
    order = torch.randperm(60, generator=torch.Generator().manual_seed(7))
    rest, held_out = examples.hold_out(7)
    assert held_out is not None
    assert held_out.texts == tuple(TEXTS[i] for i in sorted(order[:12].tolist()))
    assert rest.texts == tuple(TEXTS[i] for i in sorted(order[12:].tolist()))


SAME = ["w5 w9", "w6 w8", "W5  w9", "w6 w8", "w7"]


@pytest.mark.parametrize(
    ("kind", "table", "texts"),
    [
        ("class", {"text": SAME, "label": ["a", "b", "b", "b", "a"]}, "1 text comes"),
        ("class", {"text": SAME, "label": ["a", "b", "a", "b", "a"]}, ""),
        ("labels", {"text": SAME, "label": [["a"], ["a"], [], ["b"], ["b"]]}, "2 texts come"),
        ("rating", {"text": SAME, "label": [1.0, 2.0, 2.0, 3.0, 1.0]}, ""),  # of several people
        (
            "choice",
            {"question": SAME, "choices": [["w1", "w2"]] * 5, "answer": [0, 1, 1, 1, 0]},
            "1 text comes",
        ),
    ],
)
def test_texts_with_different_labels_are_mentioned(
    kind: Any, table: dict[str, Any], texts: str
) -> None:
    examples = encode(table, tiny_tokenizer(), kind=kind)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_contradictions(examples, None)
    assert [f"{texts} with different labels" in str(each.message) for each in told] == (
        [True] if texts else []
    )


def test_fits_and_updates_mention_texts_with_different_labels() -> None:
    data = {"text": SAME, "label": [0, 1, 1, 1, 0]}
    told = r"1 text comes with different labels \(case and spaces aside\), such as 'W5  ?w9'; mend"
    with pytest.warns(LabelWarning, match=told):
        posterior = bh.fit(tiny_model(()), "normal", data, **HOW)
    more = {"text": ["w8", "w8"], "label": [0, 1]}
    with pytest.warns(LabelWarning, match="such as 'w8'; mend"):
        posterior.update(more, progress=False)


@pytest.mark.parametrize("share", [None, 0.1])
def test_copies_are_held_out_together(share: float | None) -> None:
    examples = tripled()
    rest, held_out = examples.hold_out(0, share)
    assert examples.copies == 120 and held_out is not None
    assert len(held_out) == (36 if share is None else 18)
    assert not {*rest.hashes.tolist()} & {*held_out.hashes.tolist()}
    whole = examples.subset(range(60)).concat(examples.subset(range(60, 180)))
    assert whole.hold_out(0, share)[1].texts == held_out.texts  # type: ignore[union-attr]


def test_what_cannot_be_held_out_apart_is_learnt() -> None:
    most = encoded(["w5"] * 100 + TEXTS, [0] * 100 + LABELS)
    _, held_out = most.hold_out(0)
    assert held_out is not None and len(held_out) == 32 and "w5" not in held_out.texts
    same = encoded(["w5"] * 60, LABELS)
    few = encoded(TEXTS[:30] * 3, LABELS[:30] * 3)  # fewer than 50 texts
    for examples, share in ((same, None), (same, 0.2), (few, None)):
        assert examples.hold_out(0, share) == (examples, None)
    assert few.hold_out(0, 0.2)[1] is not None  # as asked for


@pytest.mark.parametrize("seed", range(3))
def test_a_class_is_not_held_out_whole(seed: int) -> None:
    examples = encoded(TEXTS, LABELS)
    assert examples.labels is not None
    before = examples.hold_out(seed)[1]
    assert before is not None
    rare = torch.isin(examples.hashes, before.hashes).nonzero().flatten()[:2]
    labels = examples.labels.index_fill(0, rare, 2)  # a class of two rows that were held out
    rest, held_out = replace(examples, labels=labels).hold_out(seed)
    assert rest.labels is not None and held_out is not None and held_out.labels is not None
    assert (rest.labels == 2).sum() == 2 and not (held_out.labels == 2).any()
    assert held_out.texts == before.texts[2:]


def test_copies_stay_together_where_a_class_is_rare() -> None:
    labels = [0] * 58 + [1, 2]
    texts = [*TEXTS[:58], "w5 w5 w5", "w5 w5 w5"]
    examples = encoded(texts, labels)
    for seed in range(20):
        rest, held_out = examples.hold_out(seed)
        assert held_out is not None and rest.labels is not None
        assert {*rest.labels.tolist()} == {0, 1, 2}
        assert not {*rest.hashes.tolist()} & {*held_out.hashes.tolist()}


def test_all_texts_of_a_row_count() -> None:
    pairs = {"text": ["w5", "W5", "w5"], "pair": ["w6", "w6", "w7"], "label": [0, 1, 0]}
    columns = Columns(pair="pair")
    assert encode(pairs, tiny_tokenizer(), kind="class", columns=columns).copies == 1
    choices = [["w6", "w7"], ["W7", "w6"], ["w6", "w8"]]  # each is read on its own, in any order
    asked = {"question": ["w5"] * 3, "choices": choices, "answer": [0, 1, 0]}
    assert encode(asked, tiny_tokenizer(), kind="choice").copies == 1


@pytest.mark.filterwarnings("ignore:.* with different labels")
def test_fit_says_how_many_copies_there_are() -> None:
    with pytest.warns(UserWarning, match="120 of 180 rows repeat another's text"):
        posterior = bh.fit(tiny_model(()), "delta", tripled(), **HOW)
    assert posterior.report.held_out == 36
    with pytest.warns(UserWarning, match="59 of 60 rows repeat another's text"):
        posterior = bh.fit(tiny_model(()), "delta", encoded(["w5"] * 60, LABELS), **HOW)
    assert posterior.report.held_out == 0 and posterior.report.temperature == 1.0
    bh.fit(tiny_model(()), "normal", tripled(), **HOW)  # holds nothing out


def test_validation_rows_are_none_that_are_learnt() -> None:
    data, new = encoded(TEXTS[:30], LABELS[:30]), encoded(TEXTS[30:], LABELS[30:])
    alike = encoded([ALIKE[0](text) for text in TEXTS[10:30]], LABELS[10:30])
    refused = pytest.raises(DataError, match="each of the 20 rows has the text of a row that")
    some = pytest.warns(UserWarning, match="validation: 20 of 50 rows have the text of a row that")
    with refused:
        bh.fit(tiny_model(()), "normal", data, validation=alike, **HOW)
    with some:
        posterior = bh.fit(tiny_model(()), "delta", data, validation=alike.concat(new), **HOW)
    with refused:
        posterior.widen(data, validation=alike)
    first = bh.fit(tiny_model(()), "normal", new, **HOW)
    with refused:
        first.update(data, validation=alike)
    with some:
        second = first.update(data, validation=alike.concat(new))
    for known, number in ((new, 1), (data, 2)):
        with pytest.raises(DataError, match=rf"validation: round {number} \(.*\) has learnt 30"):
            second.update(tiny_examples(12), validation=known)


def test_test_rows_of_a_comparison_are_none_that_are_learnt(tmp_path: Any) -> None:
    data, known = encoded(TEXTS[:30], LABELS[:30]), encoded(TEXTS[30:], LABELS[30:])
    for part in (data, known):
        with pytest.raises(DataError, match="test: each of the 30 rows has the text of a row that"):
            compare(tiny_model, data, known, part, tmp_path)


NAMES = ["good", "bad"] * 12


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (NAMES, ""),
        ([*NAMES, "god"], "'god' (may mean 'good') occurs once"),
        ([*NAMES, "ok"], "'ok' occurs once"),
        ([*NAMES, "Good "], "'Good ' and 'good' are two classes"),
        ([*NAMES, *"pqrst"], "'p' occurs once; 'q' occurs once; 'r' occurs once; and 2 more do"),
        ([*"abcdefghi"], ""),  # too few to say
        (["a", "a "], "'a' and 'a ' are two classes"),
    ],
)
def test_classes_that_may_be_mistakes(labels: list[str], told: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_classes("label", labels)
    assert [str(each.message) for each in found] == ([f"column 'label': {told}"] if told else [])
