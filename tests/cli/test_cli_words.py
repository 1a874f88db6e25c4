"""The program on named entities: from JSON lines to a list of tags for each sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from program import bhpeft, error, read_csv, write_csv
from saves import backbone_in

from bhpeft_pyro.cli.options import Reading
from bhpeft_pyro.cli.task import infer
from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.data.sources import load
from bhpeft_pyro.testing import tiny_tokenizer

TOKENS = [[f"w{10 + i}", "w5", *(["w6"] if i % 2 else [])] for i in range(12)]
TAGS = [["O", "PER", *(["O"] if i % 2 else [])] for i in range(12)]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("words")
    backbone_in(root / "tiny")
    rows = [
        {"id": i, "tokens": t, "ner_tags": n}
        for i, (t, n) in enumerate(zip(TOKENS, TAGS, strict=True))
    ]
    (root / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cells = [json.dumps(tags) for tags in TAGS]
    write_csv(root / "train.csv", tokens=[" ".join(words) for words in TOKENS], ner_tags=cells)
    fit = ("fit", root / "train.jsonl", "--backbone", root / "tiny", "--guide", "normal")
    quick = ("--preset", "head_only", "--max-steps", 3, "--device", "cpu", "--validation", "25%")
    result = bhpeft(*fit, *quick, "--out", root / "run")
    # A quarter of the sentences, not of the words.
    assert "3 held-out" not in result.output and "held-out words" in result.output
    return root


def test_the_task_of_lists_of_words(folder: Path) -> None:
    expected = "words: 'ner_tags' from 'tokens', 2 classes (O, PER)"
    assert str(infer(load(folder / "train.jsonl"), Reading())) == expected
    assert str(infer(load(folder / "train.csv"), Reading(task="words"))) == expected


def test_lists_of_words_in_a_csv_file(tmp_path: Path) -> None:
    for label in ("ner_tags", "label"):
        cells = {"tokens": map(json.dumps, TOKENS), label: map(json.dumps, TAGS)}
        write_csv(tmp_path / "train.csv", **{name: [*each] for name, each in cells.items()})
        found = infer(load(tmp_path / "train.csv"), Reading())
        assert str(found) == f"words: {label!r} from 'tokens', 2 classes (O, PER)"


def test_lists_of_words_beside_a_text_and_its_class() -> None:
    rows = {"text": ["w5", "w6"], "tokens": [["w5"], ["w6"]], "label": ["a", "b"]}
    assert str(infer(Dataset.from_dict(rows))) == "classes: 'label' from 'text', 2 classes (a, b)"


def test_a_row_for_each_sentence(folder: Path) -> None:
    out = folder / "out.jsonl"
    result = bhpeft(
        "predict", folder / "run", folder / "train.jsonl", "--out", out, "--flag", "20%"
    )
    assert "30 words, 6 flagged by total" in result.output
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [*range(12)]
    for row, words in zip(rows, TOKENS, strict=True):
        assert row["tokens"] == words
        for name in ("prediction", "probability", "epistemic", "flagged"):
            assert len(row[name]) == len(words)
        assert {*row["prediction"]} <= {"O", "PER"}
    assert sum(sum(row["flagged"]) for row in rows) == 6
    table = folder / "out.csv"
    bhpeft("predict", folder / "run", folder / "train.csv", "--out", table)
    same = [json.loads(row["prediction"]) for row in read_csv(table)]
    assert same == [row["prediction"] for row in rows]


def test_evaluate_update_and_stream(folder: Path) -> None:
    scores = json.loads(bhpeft("evaluate", folder / "run", folder / "train.csv", "--json").stdout)
    assert 0 <= scores["accuracy"] <= 1 and "ece" in scores and scores["examples"] == 30
    assert "30 words of" in bhpeft("evaluate", folder / "run", folder / "train.csv").output
    more = folder / "more.jsonl"
    more.write_text(json.dumps({"tokens": ["w40", "w5"], "ner_tags": ["O", "PER"]}) + "\n")
    update = ("update", folder / "run", more, "--out", folder / "next", "--max-steps", 2)
    assert "fitting to 2 words" in bhpeft(*update, "--validation", "0").output
    again = ("update", folder / "run", folder / "train.csv", "--again", "--max-steps", 2)
    bhpeft(*again, "--out", folder / "from-csv")
    stream = ("stream", folder / "train.jsonl", "--out", folder / "stream", "--batch", 6)
    tiny = ("--backbone", folder / "tiny", "--preset", "head_only", "--components", 1)
    bhpeft(*stream, *tiny, "--max-steps", 1, "--device", "cpu")


def test_tags_still_to_come_are_grown(folder: Path) -> None:
    """Those of the table are not known from the start, so more may come that sort before them."""
    table = folder / "later.jsonl"
    lines = (folder / "train.jsonl").read_text().splitlines()
    stream = ("stream", table, "--out", folder / "grown", "--batch", 6, "--grow")
    tiny = ("--backbone", folder / "tiny", "--preset", "head_only", "--components", 1)
    for new in ("PLACE", "A"):
        tokens = [["w5", f"w{30 + i}{len(lines)}"] for i in range(6)]
        lines += [json.dumps({"tokens": t, "ner_tags": [new, "O"]}) for t in tokens]
        table.write_text("\n".join(lines))
        result = bhpeft(*stream, *tiny, "--max-steps", 1, "--device", "cpu")
    assert "rounds that exist already: 3" in result.stderr


def test_shares_are_of_whole_sentences(folder: Path) -> None:
    columns = Columns(text="tokens", label="ner_tags")
    examples = encode(
        folder / "train.jsonl", tiny_tokenizer(), kind="class", each_word=True, columns=columns
    )
    learnt, held_out = examples.hold_out(0, 0.25)
    assert held_out is not None
    assert len(held_out.rows.unique()) == 3 and len(learnt.rows.unique()) == 9
    assert not {*held_out.rows.tolist()} & {*learnt.rows.tolist()}


def test_errors_name_the_row(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    rows = [{"tokens": ["w5"], "ner_tags": [0]}, {"tokens": ["w6", "w7"], "ner_tags": [1]}]
    bad.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    wrong = error("fit", bad, "--backbone", folder / "tiny", "--out", folder / "no")
    assert "bad.jsonl, column 'ner_tags', line 2: 1 labels for 2 words" in wrong
