"""Zero-shot rows: what is asked, and that the answer is the language model's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import build
from transformers import AutoModelForCausalLM

from bhpeft_pyro.data import Columns
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.model.likelihoods import Categorical, MultipleChoice, Normal
from bhpeft_pyro.testing import tiny_tokenizer
from tools.experiments.budgets import BUDGETS
from tools.experiments.grid import Grid
from tools.experiments.job import Load
from tools.experiments.methods import method
from tools.experiments.tasks import Task, split
from tools.experiments.zero_shot import Prompt

TINY = BUDGETS["tiny"]
CHOICES = Task("made-up", 1, MultipleChoice, Columns(answer="key"))
WORDS = ("w5", "w6", "w9")


def test_choices_are_asked_for_by_letters() -> None:
    rows = Dataset.from_list(
        [
            {"question": "Who?", "choices": {"text": ["he", "she"], "label": ["x", "y"]}, "key": a}
            for a in "xy"
        ]
    )
    prompt = Prompt.of(CHOICES, rows, tiny_tokenizer())
    asked = "Who?\nA. he\nB. she\nAnswer:"
    assert prompt.words == ("A", "B")
    assert prompt.rows(rows).to_dict() == {"text": [asked, asked], "label": [0, 1]}
    assert prompt.rows(rows.remove_columns("key")).column_names == ["text"]


def test_classes_are_asked_for_by_their_words() -> None:
    """Of which a text is cut as for other methods, and the question is not."""
    rows = Dataset.from_dict({"text": ["It snows a lot here."], "label": [2]})
    task = replace(TINY.tasks["classes"], words=("Hot", "Mild", "Cold"), max_length=2)
    found = Prompt.of(task, rows, tiny_tokenizer()).rows(rows).to_dict()
    assert found == {"text": ["It snows\nHot, Mild or Cold?\nAnswer:"], "label": [2]}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("stars", 1, Normal), "stars has no words for its labels"),
        (Task("made-up", 2, Categorical, words=("unknown", "unheard")), "begin with one token"),
    ],
)
def test_what_cannot_be_asked(task: Task, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompt.of(task, Dataset.from_dict({"text": ["w5"]}), tiny_tokenizer()).ids()


def test_the_answer_is_that_of_the_models_own_head(tmp_path: Path) -> None:
    """Against transformers by itself, prompt by prompt: so no padding, and no other position."""
    language = build("llama", auto=AutoModelForCausalLM)
    made = zero_shot(tmp_path, lambda own_head=False: (language, tiny_tokenizer()))
    made.complete()
    (outcome,) = made.outcomes()
    task = made.budget.tasks["classes"]
    rows = split(None, task, TINY.rows, TINY.validation, TINY.test, 0).tests["test"]
    tokenizer = tiny_tokenizer()
    prompts = Prompt.of(task, rows, tokenizer).rows(rows)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    expected = []
    for text in prompts["text"]:
        with torch.no_grad():
            logits = language(**tokenizer(text, return_tensors="pt")).logits
        expected.append(logits[0, -1, ids].softmax(-1))
    forecast = outcome.forecasts["test"]
    torch.testing.assert_close(forecast.probabilities, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert forecast.labels is not None
    assert forecast.labels.tolist() == rows["label"][:]
    assert outcome.facts["weights"] == 0


def test_an_encoder_has_no_next_word(tmp_path: Path) -> None:
    encoder = build("bert")
    with pytest.raises(ConfigError, match="BertModel does not predict; expected a decoder"):
        zero_shot(tmp_path, lambda own_head=False: (encoder, tiny_tokenizer())).complete()


@pytest.mark.parametrize("name", ["hybrid, zero-shot", "frozen, deterministic"])
def test_nothing_else_is_zero_shot(name: str) -> None:
    with pytest.raises(ConfigError, match="'frozen' and 'zero-shot' go together"):
        method(name)


def zero_shot(out: Path, load: Load) -> Grid:
    tasks = {"classes": replace(TINY.tasks["classes"], words=WORDS)}
    return Grid(
        budget=replace(TINY, tasks=tasks),
        tasks=["classes"],
        methods=[method("frozen, zero-shot")],
        rows=[TINY.rows],
        seeds=1,
        load=load,
        backbone="tiny",
        data=None,
        out=out,
    )
