"""What the documentation promises of the hub, on a hub of this machine: names of data sets and
backbones, configurations, splits and columns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value
from local_hub import LocalHub, local_hub
from program import bhpeft, error

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.testing import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("hub")

BACKBONE = "FacebookAI/roberta-base"
QUICK = ("--backbone", BACKBONE, "--guide", "delta", "--max-steps", 2, "--device", "cpu")
CSQA_CARD = """\
dataset_info:
  features:
  - name: id
    dtype: string
  - name: question
    dtype: string
  - name: question_concept
    dtype: string
  - name: choices
    sequence:
    - name: label
      dtype: string
    - name: text
      dtype: string
  - name: answerKey
    dtype: string
"""


def classes(names: list[str], count: int, first: int, column: str = "text") -> Dataset:
    """Different texts, the first word of which tells the class."""
    labels = [i % len(names) for i in range(count)]
    features = Features({column: Value("string"), "label": ClassLabel(names=names)})
    texts = [f"w{5 + label} w{first + i % 9} t{first}{i}" for i, label in enumerate(labels)]
    return Dataset.from_dict({column: texts, "label": labels}, features=features)


def hidden(table: Dataset, column: str = "label", value: Any = -1) -> Dataset:
    """As the hub publishes rows whose labels are kept back."""
    return table.map(lambda row: {column: value})


def drugs(count: int, first: int) -> Dataset:
    rows = [
        {
            "Unnamed: 0": first + i,
            "drugName": "Drug",
            "condition": None if i == 3 else "Pain",
            "review": f'"A w{5 + i % 9} t{first}{i}"',
            "rating": 1.0 + i % 10,
            "date": "May 20, 2012",
            "usefulCount": i,
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def questions(count: int, first: int) -> Dataset:
    rows = [
        {
            "id": f"{first}{i}",
            "question": f"w7 t{first}{i}",
            "question_concept": "w7",
            "choices": {"label": list("ABCDE"), "text": [f"w{k + i % 9}" for k in range(9, 14)]},
            "answerKey": "ABCDE"[i % 5],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """Every data set that is named, small, with the columns it has on the hub; and a backbone."""
    with local_hub(tmp_path_factory.mktemp("hub")) as hub:
        topics = ["World", "Sports", "Business", "Sci/Tech"]
        signs = ["negative", "positive"]
        hub.parquet(
            "fancyzhx/ag_news", {"train": classes(topics, 48, 10), "test": classes(topics, 40, 20)}
        )
        hub.parquet(
            "stanfordnlp/imdb",
            {
                "train": classes(["neg", "pos"], 30, 10),
                "test": classes(["neg", "pos"], 12, 20),
                "unsupervised": hidden(classes(["neg", "pos"], 4, 30)),
            },
            config="plain_text",
        )
        hub.parquet(
            "cornell-movie-review-data/rotten_tomatoes",
            {name: classes(["neg", "pos"], 10, 40) for name in ("train", "validation", "test")},
        )
        hub.parquet(
            "stanfordnlp/sst2",
            {
                "train": classes(signs, 30, 10, "sentence"),
                "validation": classes(signs, 12, 20, "sentence"),
                "test": hidden(classes(signs, 6, 30, "sentence")),
            },
        )
        hub.parquet(
            "tau/commonsense_qa",
            {
                "train": questions(30, 10),
                "validation": questions(12, 20),
                "test": hidden(questions(6, 30), "answerKey", ""),
            },
            card=CSQA_CARD,
        )
        hub.json_lines("lewtun/drug-reviews", {"train": drugs(30, 10), "test": drugs(12, 20)})
        hub.model(BACKBONE, tiny.build("roberta", max_position_embeddings=300), tiny_tokenizer())
        yield hub


def test_classes_from_the_command_line(tmp_path: Path) -> None:
    """Also the labels of -1 that the hub has where they are kept back."""
    run = tmp_path / "run"
    result = bhpeft("fit", "stanfordnlp/sst2", *QUICK, "--out", run)
    assert "classes: 'label' from 'sentence', 2 classes (negative, positive)" in result.stderr
    scores = json.loads(bhpeft("evaluate", run, "stanfordnlp/sst2:validation", "--json").stdout)
    assert 0 <= scores["accuracy"] <= 1
    bhpeft("predict", run, "stanfordnlp/sst2:test[:4]", "--out", tmp_path / "out.csv")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_choices_and_ratings_from_the_command_line(tmp_path: Path) -> None:
    quiz = ("--task", "choices", "--label-column", "answerKey")
    result = bhpeft("fit", "tau/commonsense_qa", *quiz, *QUICK, "--out", tmp_path / "quiz")
    assert "choices: 'answerKey' from 'question and choices'" in result.stderr
    bhpeft("evaluate", tmp_path / "quiz", "tau/commonsense_qa:validation")
    rated = ("--text-column", "review")
    result = bhpeft("fit", "lewtun/drug-reviews", *rated, *QUICK, "--out", tmp_path / "rated")
    assert "ratings: 'rating' from 'review', between 1 and 10" in result.stderr


def test_a_configuration_and_parts_of_splits_from_python() -> None:
    backbone, tokenizer = load_backbone(BACKBONE, "cpu")
    model = bh.tasks.categories(backbone, 2, tokenizer=tokenizer)
    films = "stanfordnlp/imdb[plain_text]"
    options: dict[str, Any] = {"max_steps": 2, "progress": False}
    found = bh.fit(
        model, "normal", f"{films}:train[:20]", validation=f"{films}:train[20:]", **options
    )
    assert found.report.examples == 20
    assert found.columns.label_names == ("neg", "pos")
    assert found.evaluate(f"{films}:test").keys() >= {"accuracy", "nll"}
    again = found.update("cornell-movie-review-data/rotten_tomatoes", **options)
    assert len(again.lineage) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imdb", "expected 'owner/name'"),
        ("stanfordnlp/imbd", "'stanfordnlp/imbd' doesn't exist"),
        ("stanfordnlp/imdb[plain]", r"'plain' not found. Available: \['plain_text'\]"),
        ("stanfordnlp/imdb:validation", r"split \"validation\".*'train', 'test', 'unsupervised'"),
        ("stanfordnlp/sst2", "column 'text' is missing; columns there: sentence, label"),
        ("stanfordnlp/imdb:unsupervised", "row 0: the label is missing.*3 more"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    backbone, tokenizer = load_backbone(BACKBONE, "cpu")
    model = bh.tasks.categories(backbone, 2, tokenizer=tokenizer)
    with pytest.raises(DataError, match=message):
        bh.fit(model, "delta", name, progress=False)


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    fit = ("fit", "stanfordnlp/sst2:train[:16]", "--out", tmp_path / "run")
    assert "'me/none' is not a folder" in error(*fit, "--backbone", "me/none")
    said = error("fit", "tau/commonsense_qa", *QUICK, "--out", tmp_path, "--task", "choices")
    assert re.search(r"column 'answer'.*answerKey", said)


@pytest.mark.slow
def test_the_variables_of_the_hub_are_all_it_takes(hub: LocalHub, tmp_path: Path) -> None:
    """A process of its own, first with the hub and then with what it left in the cache."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    fit = ["fit", "fancyzhx/ag_news:train[:24]", *map(str, QUICK)]
    for offline in ("0", "1"):
        command = [sys.executable, "-m", "bhpeft_pyro", *fit, "--out", str(tmp_path / offline)]
        done = subprocess.run(
            command, env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "4 classes (World, Sports, Business, Sci/Tech)" in done.stderr
