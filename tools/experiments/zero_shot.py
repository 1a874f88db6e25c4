"""The frozen language model as it is, asked in words: nothing is learnt from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bhpeft_pyro.data import Columns
from bhpeft_pyro.data.columns import read_answers, read_choices
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.inference.loop import as_module
from bhpeft_pyro.inference.predict import AnyForecast
from bhpeft_pyro.model.head import OwnHead
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.posterior.posterior import Posterior

from .job import Fitted, Job
from .tasks import Task

__all__ = ["Prompt", "zero_shot"]

_COLUMNS = Columns()  # of prompted rows


@dataclass(frozen=True)
class Prompt:
    """From a task's rows to rows of prompts, whose next token is to be the label.

    Classes are asked for by their `Task.words`, choices by letters. Of a text as many tokens are
    shown as other methods read.

    Attributes:
        task: with classes that have words, or with choices.
        words: one a label.
        tokenizer: the language model's.

    >>> from ..likelihoods import Categorical
    >>> from ..testing import tiny_tokenizer
    >>> task = Task("made-up", 2, Categorical, max_length=2, words=("Good", "Bad"))
    >>> prompt = Prompt.of(task, Dataset.from_dict({"text": []}), tiny_tokenizer())
    >>> print(prompt.rows(Dataset.from_dict({"text": ["w5 w6 w7"]}))["text"][0])
    w5 w6
    Good or Bad?
    Answer:
    """

    task: Task
    words: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The prompt of a task, with as many letters as `rows` have choices.

        Raises:
            ConfigError: the task has neither choices nor words.
        """
        kind = task.likelihood().kind
        if kind == "choice":
            options, _ = read_choices(rows[task.columns.choices][:], task.columns.choices)
            return cls(task, tuple(ascii_uppercase[: max(map(len, options))]), tokenizer)
        if not task.words:
            raise ConfigError(f"zero-shot: {task.source} has no words for its labels")
        return cls(task, task.words, tokenizer)

    def ids(self) -> tuple[int, ...]:
        """The token that each word begins with.

        Raises:
            ConfigError: two words begin alike.
        """
        found = tuple(
            self.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in self.words
        )
        if len(set(found)) < len(found):
            raise ConfigError(f"zero-shot: two of the words {self.words} begin with one token")
        return found

    def rows(self, table: Dataset) -> Dataset:
        """Prompts, with the labels as indices where there are any."""
        columns, target = self.task.columns, self.task.target
        labels = table[target][:] if target in table.column_names else None
        if self.task.likelihood().kind == "choice":
            options, marks = read_choices(table[columns.choices][:], columns.choices)
            asked = zip(table[columns.question][:], options, strict=True)
            texts = [self._ask(question, choices) for question, choices in asked]
            if labels is not None:
                labels = read_answers(labels, target, options, marks).tolist()
        else:
            texts = [self._ask(self._cut(text)) for text in table[columns.text][:]]
        made = {_COLUMNS.text: texts}
        return Dataset.from_dict(made if labels is None else {**made, _COLUMNS.label: labels})

    def _cut(self, text: str) -> str:
        *_, (_, end) = self.tokenizer(
            text,
            max_length=self.task.max_length,
            truncation=True,
            add_special_tokens=False,
            return_offsets_mapping=True,
        )["offset_mapping"]
        return text[:end]

    def _ask(self, text: str, choices: Sequence[str] = ()) -> str:
        *first, last = self.words
        question = f"{', '.join(first)} or {last}?"
        pairs = zip(self.words, choices, strict=False)
        options = "\n".join(f"{word}. {choice}" for word, choice in pairs)
        return f"{text}\n{options or question}\nAnswer:"


def zero_shot(job: Job) -> Fitted:
    """A language model's own head, asked in words; no row is learnt."""
    backbone, tokenizer = job.load(own_head=True)
    prompt = Prompt.of(job.task, job.train, tokenizer)
    network = RandomPEFT(backbone, (), OwnHead(prompt.ids()), tokenizer)
    nothing = as_module(lambda batch: {})
    posterior = Posterior(Model(network), nothing, (), _COLUMNS)

    def predict(rows: Dataset) -> AnyForecast:
        return posterior.predict(prompt.rows(rows), samples=1, keep_samples=True)

    return Fitted(predict, posterior, predict(job.validation), {"temperature": 0.0}, prompt.rows)
