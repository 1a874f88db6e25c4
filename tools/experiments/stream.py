"""Sequential updating on real text.

Rounds of doubling size, domains or sources of questions in turn, weeks of news: each batch is
predicted first, then learnt, by the posterior as the prior and by what it is to be compared with.
A run that was killed continues after its last round.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bhpeft_pyro.data import Columns, CutWarning, Examples, encode
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.likelihoods import Categorical, Likelihood, MultipleChoice, Normal
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.streams import Record, prequential

from . import stream_report
from .arms import ARMS, GUIDE, OURS, Arm, Setup
from .job import Load
from .machine import clock, in_turn, over
from .protocols import PROTOCOLS, Stream
from .runs import Experiment, Given, Run, Setting, file_of
from .tables import Table
from .tasks import digest_of

__all__ = ["COST", "EXPERIMENT", "Encoded", "cost", "run", "setup"]

# Tokens: most sentences, and the headline of news; questions with a choice, whole.
_MAX_LENGTH = {"class": 32, "rating": 32, "choice": 64}
_LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "class": Categorical,
    "rating": partial(Normal, spread=2.0),
    "choice": MultipleChoice,
}
_TIMED = 100  # rows, at most, of the round whose cost is measured


def _runs(setting: Setting, seeds: int) -> list[Run]:
    return list(product(PROTOCOLS, range(seeds), ARMS))


def _sizes(given: Given, protocol: str) -> dict[str, Any]:
    """Rows of a round and of a test."""
    chosen = PROTOCOLS[protocol]
    rows, test = given.setting["rows"], given.setting["test"]
    return {
        "rows": chosen.rows if rows is None else rows,
        "test": chosen.test if test is None else test,
    }


def _read(given: Given, protocol: str, seed: int) -> tuple[Encoded, Setup]:
    """The data of a stream, and what the arms have in common on it."""
    stream = PROTOCOLS[protocol].read(given.data, seed, *_sizes(given, protocol).values())
    data = Encoded(stream, given.load()[1])
    return data, setup(data, given.load, given.setting["preset"], seed)


def _run(given: Given, protocol: str, seed: int, arm: str) -> dict[str, Any]:
    """One arm on a stream; a killed run continues after its last round."""
    sizes = _sizes(given, protocol)
    setting = {**given.setting, **sizes, "backbone": given.backbone}
    # Another setting never continues these rounds.
    name = (protocol, seed, arm, digest_of(setting)[:12])
    folder = file_of(given.out, name, "rounds")
    data, common = _read(given, protocol, seed)
    outcome = run(ARMS[arm], common, data, folder, given.setting["samples"])
    shutil.rmtree(folder, ignore_errors=True)
    return {**sizes, "protocol": protocol, "seed": seed, "arm": arm, **outcome}


def _tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    made = []
    for protocol in dict.fromkeys(result["protocol"] for result in results):
        of_it = [result for result in results if result["protocol"] == protocol]
        made += stream_report.tables(of_it, protocol)
    return made


def _cost(given: Given, protocol: str, _: str) -> dict[str, Any]:
    timed = {name: arm for name, arm in ARMS.items() if name.startswith(OURS)}
    return {"protocol": protocol, "cost": cost(timed, _read(given, protocol, 0)[1])}


class Encoded:
    """A stream as one tokenizer sees it."""

    def __init__(self, stream: Stream, tokenizer: PreTrainedTokenizerBase) -> None:
        self.kind, self.classes = stream.kind, stream.classes
        self.tokenizer = tokenizer
        self.batches = {name: self._encode(table) for name, table in stream.batches.items()}
        self.tests = {name: self._encode(table) for name, table in stream.tests.items()}
        self.final = None if stream.final is None else self._encode(stream.final)
        unlabelled = stream.unlabelled
        self.unlabelled = None if unlabelled is None else self._encode(unlabelled, labelled=False)

    def _encode(self, table: object, labelled: bool = True) -> Examples:
        with warnings.catch_warnings():
            # So many tokens is what this experiment reads.
            warnings.filterwarnings("ignore", category=CutWarning)
            return encode(
                table,
                self.tokenizer,
                kind=self.kind,
                classes=self.classes if self.kind == "class" else None,
                columns=Columns(max_length=_MAX_LENGTH[self.kind]),
                labelled=labelled,
            )


def setup(data: Encoded, load: Load, preset: str, seed: int) -> Setup:
    """What the arms have in common, on a stream."""

    def model() -> Model:
        torch.manual_seed(seed)
        network = RandomPEFT(
            load()[0],
            tuple(getattr(presets, preset)()),
            Head(data.classes),
            data.tokenizer,
        )
        if data.unlabelled is not None:
            network.align(batch for _, batch in data.unlabelled.by_length(32))
        return Model(network, likelihood=_LIKELIHOODS[data.kind]())

    return Setup(model, data.batches, seed)


def run(arm: Arm, setup: Setup, data: Encoded, folder: Path, samples: int) -> dict[str, Any]:
    """Learn a stream: its record, and metrics on the final test.

    Args:
        folder: of the rounds; a killed run continues after the last one there.
        samples: draws of a prediction, where the arm has a posterior.
    """
    last = prequential(
        setup.model(),
        arm(setup),
        data.batches,
        folder,
        tests=data.tests,
        samples=samples,
        drift=False,
        progress=False,
    )
    outcome: dict[str, Any] = {"rounds": Record.of(last).rows}
    if data.final is not None:
        outcome["final"] = last.evaluate(data.final, samples)
    return outcome


def cost(arms: dict[str, Arm], setup: Setup, repeats: int = 3) -> dict[str, float]:
    """Seconds of the processor in an arm's round, over those of a plain round on the same data.

    A plain round is a fit of the same guide under the first prior. They take turns; the median of
    the ratios.

    Args:
        arms: whose first rounds are fits of `arms.GUIDE`.
    """
    before, data = (
        batch.subset(range(min(_TIMED, len(batch)))) for batch in list(setup.batches.values())[-2:]
    )
    learners = {name: arm(setup) for name, arm in arms.items()}
    last = {name: learn(None, before) for name, learn in learners.items()}
    first = next(iter(last.values())).model

    def plain() -> None:
        fit(first, GUIDE, data, components=1, **setup.options)

    rounds = {name: partial(learn, last[name], data) for name, learn in learners.items()}
    seconds = in_turn({"": plain, **rounds}, repeats, clock(first.network.device))
    return {name: over(seconds[name], seconds[""]) for name in rounds}


_SETTING = {"rows": None, "test": None, "samples": 64, "preset": "bh_peft"}
EXPERIMENT = Experiment("What do rounds learn, and forget?", _runs, _run, _tables, _SETTING, 5)
COST = Experiment(
    "What does a round cost?",
    lambda setting, seeds: [(protocol, "cost") for protocol in PROTOCOLS],
    _cost,
    lambda results: [stream_report.costs(result["cost"]) for result in results],
    _SETTING,
)
