"""Files and streams that are read part by part, and tokens that are looked at in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, IterableDatasetDict, Value
from program import write_csv

from bhpeft_pyro.data import Columns, copies, encode, tokens
from bhpeft_pyro.data.sources import load, parts
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_tokenizer

TEXTS = [f"w{5 + i % 7} w{10 + i}" + " w3" * (i % 4) for i in range(10)]
NAMED = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_parts_are_the_file(name: str, size: int, tmp_path: Path) -> None:
    path, columns = tmp_path / name, {"n": list(range(10)), "text": TEXTS}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if name == "rows.csv":
        write_csv(path, **columns)
    else:
        path.write_text("\n".join(["", *map(json.dumps, rows), ""]))
    found = [*parts(path, ("text",), size)]
    assert [len(part["text"]) for part in found] == [
        min(size, 10 - start) for start in range(0, 10, size)
    ]
    joined = {column: [cell for part in found for cell in part[column]] for column in columns}
    assert joined == columns == load(path, ("text",))[:]


def test_a_bad_line_is_refused_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w5"}\n{"text": "w6"}\n{"text"\n')
    read = parts(path, None, 1)
    assert [next(read), next(read)] == [{"text": ["w5"]}, {"text": ["w6"]}]
    with pytest.raises(DataError, match=r"rows.jsonl.*line 3 is not JSON"):
        next(read)


def test_a_stream_is_its_rows() -> None:
    table = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 5}, NAMED)
    expected = encode(table, tiny_tokenizer(), kind="class")
    named = table.add_column("junk", [*range(10)]).to_iterable_dataset()
    # After `map` a stream does not know its columns; the names of the classes are then unknown too.
    mapped = named.map(lambda row: {"label": ["no", "yes"][row["label"]]})
    assert mapped.column_names is None
    for stream in (named, named.with_format("torch"), mapped):
        found = encode(stream, tiny_tokenizer(), kind="class")
        assert found.fingerprint == expected.fingerprint and found.texts == expected.texts
        assert found.label_names == ("no", "yes")
    bare = encode(table.remove_columns("label"), tiny_tokenizer(), kind="class", labelled=False)
    stream = named.remove_columns("label")
    found = encode(stream, tiny_tokenizer(), kind="class", labelled=False)
    assert found.fingerprint == bare.fingerprint


def test_of_a_stream_only_the_columns_needed_are_kept() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": text, "junk": object()} for text in TEXTS)

    features = Features({"text": Value("string"), "junk": Value("string")})
    stream = IterableDataset.from_generator(rows, features=features)
    assert len(encode(stream, tiny_tokenizer(), kind="class", labelled=False)) == 10


def test_streams_that_cannot_be_used_are_refused() -> None:
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    for source, message in (
        (stream, "column 'label' is missing; columns there: 'text'"),
        (stream.filter(lambda row: False), "source is empty"),
        (IterableDatasetDict(train=stream), "pass one of its splits: 'train'"),
    ):
        with pytest.raises(DataError, match=message):
            encode(source, tiny_tokenizer(), kind="class")


def every_kind() -> list[Any]:
    choices = [["w5", "w6 w7", "w8"][: 2 + i % 2] for i in range(10)]
    numbers = Columns(extra=("n",))
    ratings = {"text": TEXTS, "label": [i / 7 for i in range(10)], "n": range(10)}
    return [
        encode({"text": TEXTS, "label": [0, 1] * 5}, tiny_tokenizer(), kind="class"),
        encode(ratings, tiny_tokenizer(), kind="rating", columns=numbers),
        encode(
            {"text": TEXTS, "label": [["a", "b"][: i % 3] for i in range(10)]},
            tiny_tokenizer(),
            kind="labels",
        ),
        encode(
            {"question": TEXTS, "choices": choices, "answer": [i % 2 for i in range(10)]},
            tiny_tokenizer(),
            kind="choice",
        ),
    ]


def test_fingerprints_stay_those_of_saved_posteriors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the reports of saved rounds, which know by them what was learnt."""
    known = ["e6721bdd65e05e02", "5a4f173a69336e16", "c2716b1ff6ec5788", "44763a2ed4a287c1"]
    for size in (10_000, 3):
        monkeypatch.setattr(copies, "CHUNK", size)
        assert [each.fingerprint[:16] for each in every_kind()] == known


def test_a_subset_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([9, 0, 4, 4, 7, 1, 2])
    for each in every_kind():
        monkeypatch.setattr(tokens, "CHUNK", 10_000)
        whole = each.subset(rows)
        monkeypatch.setattr(tokens, "CHUNK", 2)
        part = each.subset(rows)
        assert torch.equal(part.tokens.ids, whole.tokens.ids)
        assert torch.equal(part.tokens.lengths, whole.tokens.lengths)
