"""Cells as texts and words, and the labels of words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tables import tagged

from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.data.columns import as_words
from bhpeft_pyro.errors import BHPEFTWarning
from bhpeft_pyro.testing import tiny_tokenizer

NER = Columns(text="tokens", label="tags")


def test_a_sentence_is_a_list_a_text_or_json() -> None:
    cells = ['["New York", "w5"]', "w5  w6\there", "[1] w7", '["open', "[1]", ["w 5"]]
    expected = [
        ["New York", "w5"],
        ["w5", "w6", "here"],
        ["[1]", "w7"],
        ['["open'],
        ["[1]"],
        ["w 5"],
    ]
    assert [as_words(cell) for cell in cells] == expected


def test_words_without_a_label_are_left_out() -> None:
    tokens = [["w5", "w6"], ["w7"], ["w8", "w9", "w10"]]
    examples = tagged(tokens, [["O", "B"], [None], ["B", None, "O"]])
    assert examples.texts == ("w5", "w6", "w8", "w10")
    assert examples.labels is not None and examples.labels.tolist() == [1, 0, 0, 1]
    assert examples.label_names == ("B", "O")
    features = Features(
        {"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "B"]))}
    )
    rows = Dataset.from_dict({"tokens": tokens, "tags": [[0, 1], [-100], [1, -100, 0]]}, features)
    hub = encode(rows, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert hub.label_names == ("O", "B") and hub.labels is not None
    assert hub.labels.tolist() == [0, 1, 1, 0]


def test_that_gaps_leave_all_labels_of_words_unused_is_said() -> None:
    tokens = [["w5", "w6"], ["w7"], ["w8", "w9", "w10"]]
    said = r"'tags': 2 of 6 words have no label, .*; posterior.encode\(data\) keeps the words"
    with pytest.warns(BHPEFTWarning, match=said):
        whole = tagged(tokens, [["O", "B"], [None], ["B", None, "O"]], labelled=False)
    assert len(whole) == 6 and whole.labels is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of words that have no label at all nothing is left unused
        assert tagged(tokens, [[None] * 2, [-100], [None] * 3], labelled=False).labels is None


def test_a_word_has_any_kind_of_label_and_the_numbers_of_its_sentence() -> None:
    tokens = [["w5", "w6"], ["w7"]]
    times = tagged(tokens, [[1.5, 2.0], [0.5]], kind="rating")
    assert times.labels is not None and times.labels.tolist() == [1.5, 2.0, 0.5]
    several = tagged(tokens, [[["a"], []], [["a", "b"]]], kind="labels")
    assert several.labels is not None and several.labels.tolist() == [[1, 0], [0, 0], [1, 1]]
    rows = {"tokens": tokens, "tags": [["a", None], ["b"]], "age": [1, 2]}
    columns = Columns(text="tokens", label="tags", extra=["age"])
    examples = encode(rows, tiny_tokenizer(), kind="class", each_word=True, columns=columns)
    assert examples.extra["age"].tolist() == [1, 2]


def test_words_of_files(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('tokens,tags\nw5 w6,"[""O"", ""B""]"\nw7,"[""O""]"\n')
    examples = encode(file, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert examples.texts == ("w5", "w6", "w7") and examples.label_names == ("B", "O")
    lines = [{"tokens": ["w5", "w6"], "tags": ["O", "B"]}, {"tokens": ["w7"], "tags": ["O"]}]
    other = tmp_path / "data.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)))
    same = encode(other, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert same.fingerprint == examples.fingerprint
