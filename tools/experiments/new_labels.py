"""New labels over rounds: `python -m tools.experiments.new_labels`.

News of two topics come first, then rounds with one more topic each, with rows of the earlier topics
or without. At the end all methods predict the same rows of all four topics. One result file for
each run; the table is made from the files alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import LabelWarning
from bhpeft_pyro.data.assets import minilm

from .arms import AT_ONCE, GUIDE
from .results import run_all
from .tables import OVER_SEEDS, Table, distinct
from .tasks import once, read

__all__ = ["ARMS", "new_labels", "table"]

Rows = dict[str, list[str]]

_ALONE = "posterior, rows of the new topic alone"
_TEXTS = "posterior, rows of the new topic, earlier texts kept"
_TUNING = "fine-tuning, with rows of earlier topics"
ARMS = ("posterior, with rows of earlier topics", _TEXTS, _ALONE, _TUNING, AT_ONCE)
_FIRST = 2  # topics of the first round


def new_labels(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/new-labels"),
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = 3,
    rows: Annotated[int, typer.Option(help="Rows of a topic in its first round.")] = 100,
    again: Annotated[int, typer.Option(help="Rows of an earlier topic in a round.")] = 25,
    test: Annotated[int, typer.Option(help="Test rows of each topic.")] = 100,
) -> None:
    """Run all arms, and print what they reach."""
    setting = {"rows": rows, "again": again, "test": test}
    runs = list(product(range(seeds), ARMS))
    backbone = minilm()

    def model(seed: int, topics: int) -> bh.Model:
        torch.manual_seed(seed)
        return bh.tasks.categories(AutoModel.from_pretrained(backbone), topics)

    def result(seed: int, arm: str) -> dict[str, Any]:
        count = 0 if arm in (_ALONE, _TEXTS) else again
        rounds, tests = _stream(data, seed, rows, count, test)
        how: dict[str, Any] = {"seed": seed, "progress": False}
        if arm == AT_ONCE:
            whole = [row for part in rounds for row in zip(*part.values(), strict=True)]
            topics = len({topic for _, topic in whole})
            posterior = bh.fit(model(seed, topics), GUIDE, _columns(whole), components=1, **how)
        else:
            how["keep_texts"] = arm == _TEXTS
            posterior = bh.fit(model(seed, _FIRST), GUIDE, rounds[0], components=1, **how)
            for part in rounds[1:]:
                if arm == _TUNING:
                    posterior = _tuned(posterior, part, **how)
                else:
                    with warnings.catch_warnings(action="ignore", category=LabelWarning):
                        posterior = posterior.update(part, grow=True, **how)
        draws = 0 if arm == _TUNING else None
        first = {name: values[: _FIRST * test] for name, values in tests.items()}
        scores = {
            "end": posterior.evaluate(tests, draws),
            "first": posterior.evaluate(first, draws),
        }
        return {"seed": seed, "arm": arm, **scores}

    typer.echo(table(run_all(out, runs, setting, result)).markdown())


def _stream(folder: Path, seed: int, rows: int, again: int, test: int) -> tuple[list[Rows], Rows]:
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


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(new_labels)))
