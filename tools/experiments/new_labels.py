"""New labels over rounds.

News of two topics come first, then rounds with one more topic each, with rows of the earlier topics
or without. At the end all methods predict the same rows of all four topics.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import bhpeft_pyro as bh
from bhpeft_pyro.data import LabelWarning

from .arms import AT_ONCE, GUIDE
from .runs import Experiment, Given
from .tables import OVER_SEEDS, Table, distinct
from .tasks import once, read

__all__ = ["ARMS", "EXPERIMENT", "table"]

Rows = dict[str, list[str]]

_ALONE = "posterior, rows of the new topic alone"
_TEXTS = "posterior, rows of the new topic, earlier texts kept"
_TUNING = "fine-tuning, with rows of earlier topics"
ARMS = ("posterior, with rows of earlier topics", _TEXTS, _ALONE, _TUNING, AT_ONCE)
_FIRST = 2  # topics of the first round


def _model(given: Given, seed: int, topics: int) -> bh.Model:
    torch.manual_seed(seed)
    backbone, tokenizer = given.load()
    return bh.tasks.categories(backbone, topics, tokenizer=tokenizer)


def _run(given: Given, seed: int, arm: str) -> dict[str, Any]:
    rows, again, test = (given.setting[name] for name in ("rows", "again", "test"))
    rounds, tests = _stream(given.data, seed, rows, 0 if arm in (_ALONE, _TEXTS) else again, test)
    how: dict[str, Any] = {"seed": seed, "progress": False}
    if arm == AT_ONCE:
        whole = [row for part in rounds for row in zip(*part.values(), strict=True)]
        model = _model(given, seed, len({topic for _, topic in whole}))
        posterior = bh.fit(model, GUIDE, _columns(whole), components=1, **how)
    else:
        how["keep_texts"] = arm == _TEXTS
        posterior = bh.fit(_model(given, seed, _FIRST), GUIDE, rounds[0], components=1, **how)
        for part in rounds[1:]:
            posterior = _learnt(posterior, part, arm, how)
    draws = 0 if arm == _TUNING else None
    first = {name: values[: _FIRST * test] for name, values in tests.items()}
    scores = {"end": posterior.evaluate(tests, draws), "first": posterior.evaluate(first, draws)}
    return {"seed": seed, "arm": arm, **scores}


def _learnt(posterior: bh.Posterior, part: Rows, arm: str, how: dict[str, Any]) -> bh.Posterior:
    if arm == _TUNING:
        return _tuned(posterior, part, **how)
    with warnings.catch_warnings(action="ignore", category=LabelWarning):
        return posterior.update(part, grow=True, **how)


def _stream(
    folder: Path | None, seed: int, rows: int, again: int, test: int
) -> tuple[list[Rows], Rows]:
    """The rows of each round, no text twice, and those of the tests, in the order of topics."""
    generator = torch.Generator().manual_seed(seed)
    news = once(read(folder, "news-agnews"), "text")
    news = news.select(torch.randperm(len(news), generator=generator).tolist())
    of_topic: dict[str, list[str]] = {}
    for text, topic in zip(news["text"][:], news["label_name"][:], strict=True):
        of_topic.setdefault(topic, []).append(text)
    known = sorted(of_topic)
    topics = [known[i] for i in torch.randperm(len(known), generator=generator).tolist()]

    def taken(topic: str, count: int) -> list[tuple[str, str]]:
        some, of_topic[topic] = of_topic[topic][:count], of_topic[topic][count:]
        return [(text, topic) for text in some]

    tests = _columns([row for topic in topics for row in taken(topic, test)])
    rounds = [[row for topic in topics[:_FIRST] for row in taken(topic, rows)]]
    for number, topic in enumerate(topics[_FIRST:], _FIRST):
        earlier = [row for name in topics[:number] for row in taken(name, again)]
        rounds.append([*taken(topic, rows), *earlier])
    return [_columns(part) for part in rounds], tests


def _columns(pairs: Sequence[tuple[str, str]]) -> Rows:
    return {"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}


def _tuned(last: bh.Posterior, part: Rows, **how: Any) -> bh.Posterior:
    """Fine-tuning from where the last round ended, under the first prior at the weight 0."""
    known = last.columns.label_names or ()
    last = last.grow([name for name in dict.fromkeys(part["label"]) if name not in known])
    (first,) = last.first_priors
    assert first is not None
    model = last.model.with_prior(first)
    examples = last.encode(part)
    return bh.fit(model, copy.deepcopy(last.guide), examples, temperature=0.0, **how)


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """What each arm reaches."""
    records = [
        {
            "arm": result["arm"],
            "accuracy at the end": result["end"]["accuracy"],
            "nll at the end": result["end"]["nll"],
            "accuracy on the first two topics": result["first"]["accuracy"],
        }
        for result in results
    ]
    note = (
        f"{distinct(results, 'rows')} rows of each topic in its first round, "
        f"{distinct(results, 'again')} of every earlier topic in a later round, "
        f"{distinct(results, 'test')} test rows of each. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    return Table.over_seeds("Rounds: new labels", ["arm"], records, note)


EXPERIMENT = Experiment(
    "What if labels arrive one after another?",
    lambda setting, seeds: list(product(range(seeds), ARMS)),
    _run,
    lambda results: [table(results)],
    # Of a topic in its first round, of each earlier one in a later round, of the test.
    {"rows": 100, "again": 25, "test": 100},
    3,
)
